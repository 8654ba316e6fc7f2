"""What `mrope check` says: a table on the terminal, and a JSON file. The page: `page`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mrope import __version__
from mrope.check.rows import RowCheck
from mrope.check.summary import Findings, Summary
from mrope.errors import MRopeError
from mrope.spec.spec import MRopeSpec

_ROWS_LISTED = 12
_COUNTS = ("of", "rows", "bad", "compared", "tokens", "images", "videos", "frames")


@dataclass(frozen=True)
class Check:
    """A finished check, with what it was of.

    Attributes:
        source: the dataset, as it was named.
        spec: the model's numbers.
        compared: whether rows were compared with transformers.
        comparison: with which, or why not.
        summary: what was found.
        seconds: how long it took.
    """

    source: str
    spec: MRopeSpec
    compared: bool
    comparison: str
    summary: Summary
    seconds: float


def show(check: Check, console: Console) -> None:
    """Print the numbers, the bad rows by cause, and the verdict."""
    summary = check.summary
    table = Table(title=f"{check.spec.family}, {check.spec.reference}", show_header=False)
    for name, value in numbers(check):
        table.add_row(name, escape(value))
    console.print(table)
    for cause, found in summary.causes.items():
        heading = Text(f"{count_rows(len(found.rows))}: {cause}", style="bold red")
        console.print(heading, soft_wrap=True)
        for example in found.examples:
            line = Text(f"  row {example.row}: {said(example)}")
            console.print(line, soft_wrap=True)
        if len(found.rows) > len(found.examples):
            console.print(Text(f"  and {listed(found)}"), soft_wrap=True)
    console.print(Text(verdict(summary), style=f"bold {'red' if summary.bad else 'green'}"))


def numbers(check: Check) -> Iterator[tuple[str, str]]:
    """Yield what was counted, each with its name."""
    summary = check.summary
    yield "dataset", check.source
    of = "" if summary.rows == summary.of else f" of {summary.of:,}"
    yield "rows", f"{summary.rows:,}{of}, {summary.bad:,} bad"
    for name in ("tokens", "images", "videos", "frames"):
        yield name, f"{getattr(summary, name):,}"
    if summary.longest is not None:
        yield "longest", f"row {summary.longest.row}, {summary.longest.tokens:,} tokens"
        yield "lengths", ", ".join(f"{name} {n:,}" for name, n in summary.quantiles().items())
    yield "reference", check.comparison
    if check.compared:
        yield "compared", f"{summary.compared:,} good rows, all equal"
    for error, found in summary.unanswered.items():
        yield "not compared", f"{count_rows(len(found.rows))} where that function raises {error}"


def verdict(summary: Summary) -> str:
    """Return the last line."""
    bad = f"{summary.bad:,} of {count_rows(summary.rows)} {'is' if summary.bad == 1 else 'are'} bad"
    said = bad if summary.bad else f"{count_rows(summary.rows)}, none bad"
    return said if summary.stopped is None else f"{said}; stopped early: {summary.stopped}"


def write_json(check: Check, file: Path) -> None:
    """Write everything that was found; each bad row is listed by its number.

    Raises:
        MRopeError: the file cannot be written.
    """
    summary = check.summary
    longest = summary.longest
    table = {
        "mrope": __version__,
        "dataset": check.source,
        "family": check.spec.family,
        "reference": check.spec.reference,
        "comparison": check.comparison,
        "seconds": round(check.seconds, 3),
        "stopped": summary.stopped,
        **{name: getattr(summary, name) for name in _COUNTS},
        "longest": longest and {"row": longest.row, "tokens": longest.tokens},
        "lengths": summary.quantiles(),
        "causes": [_as_json("cause", *item) for item in summary.causes.items()],
        "unanswered": [_as_json("raises", *item) for item in summary.unanswered.items()],
    }
    write_text(file, json.dumps(table, indent=1) + "\n")


def said(example: RowCheck) -> str:
    """Return what is wrong with a row, without the cause that stands above it."""
    return str(example.message).removesuffix(f" Likely cause: {example.cause}.")


def listed(found: Findings) -> str:
    """Return the numbers of rows beyond the examples, the first of them at least."""
    more = found.rows[len(found.examples) :]
    shown = ", ".join(map(str, more[:_ROWS_LISTED]))
    rest = f" and {len(more) - _ROWS_LISTED:,} more" if len(more) > _ROWS_LISTED else ""
    return f"row{'s' if len(more) > 1 else ''} {shown}{rest}"


def count_rows(count: int) -> str:
    """Return a number of rows in words."""
    return f"{count:,} row{'' if count == 1 else 's'}"


def write_text(file: Path, text: str) -> None:
    """Write a file.

    Raises:
        MRopeError: it cannot be written.
    """
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MRopeError(f"cannot write {file}: {error.strerror or error}") from error


def _as_json(name: str, what: str, found: Findings) -> dict[str, Any]:
    examples = [
        {"row": example.row, "message": example.message, "layout": _layout(example)}
        for example in found.examples
    ]
    return {name: what, "rows": list(found.rows), "examples": examples}


def _layout(example: RowCheck) -> dict[str, Any] | None:
    return None if example.layout is None else asdict(example.layout)
