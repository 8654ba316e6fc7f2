"""Report a finished check as a table on the terminal and as a JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mrope import __version__
from mrope.check.fit_shapes import Proposal, print_proposal, proposal_as_json
from mrope.check.rows import RowCheck
from mrope.check.summary import Findings, Summary
from mrope.columns import NewColumns
from mrope.errors import MRopeError
from mrope.spec.spec import MRopeSpec

_ROWS_LISTED = 12
_COUNTS = ("of", "rows", "bad", "compared", "tokens", "images", "videos", "frames")


@dataclass(frozen=True)
class Check:
    """A finished check of one dataset.

    Attributes:
        source: the dataset as named in the config.
        spec: the model's values.
        compared: whether rows were compared with transformers.
        comparison: sentence with the release compared with, or why none was.
        summary: the results.
        seconds: duration.
        proposal: ladder of fixed shapes for the rows; None if none was asked for.
    """

    source: str
    spec: MRopeSpec
    compared: bool
    comparison: str
    summary: Summary
    seconds: float
    proposal: Proposal | None = None


def print_report(check: Check, console: Console) -> None:
    """Print the counts, the bad rows by cause, and the verdict."""
    summary = check.summary
    table = Table(title=f"{check.spec.family}, {check.spec.reference}", show_header=False)
    for name, value in list_counts(check):
        table.add_row(name, escape(value))
    console.print(table)
    for cause, found in summary.causes.items():
        heading = Text(f"{count_rows(len(found.rows))}: {cause}", style="bold red")
        console.print(heading, soft_wrap=True)
        for example in found.examples:
            line = Text(f"  row {example.row}: {strip_cause(example)}")
            console.print(line, soft_wrap=True)
        if len(found.rows) > len(found.examples):
            console.print(Text(f"  and {list_other_rows(found)}"), soft_wrap=True)
    if check.proposal is not None:
        print_proposal(check.proposal, console)
    console.print(
        Text(describe_verdict(summary), style=f"bold {'red' if summary.bad else 'green'}")
    )


def list_counts(check: Check) -> Iterator[tuple[str, str]]:
    """Yield name and text of every line of the table."""
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
        good = "good row" if summary.compared == 1 else "good rows"
        yield "compared", f"{summary.compared:,} {good}, all equal" if summary.compared else "none"
    for error, found in summary.unanswered.items():
        yield "not compared", f"{count_rows(len(found.rows))} where that function raises {error}"


def describe_verdict(summary: Summary) -> str:
    """Describe in one line how many rows are bad, and why the check stopped early if it did."""
    bad = f"{summary.bad:,} of {count_rows(summary.rows)} {'is' if summary.bad == 1 else 'are'} bad"
    verdict = bad if summary.bad else f"{count_rows(summary.rows)}, none bad"
    return verdict if summary.stopped is None else f"{verdict}; stopped early: {summary.stopped}"


def write_json(check: Check, file: Path) -> None:
    """Write all results as JSON, with the index of every bad row.

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
    if check.proposal is not None:
        table["shapes"] = proposal_as_json(check.proposal)
    write_text(file, json.dumps(table, indent=1) + "\n")


def strip_cause(example: RowCheck) -> str:
    """Return the message of a row without the cause, which the heading states."""
    return str(example.message).removesuffix(f" Likely cause: {example.cause}.")


def list_other_rows(found: Findings) -> str:
    """List the indices of rows beyond the examples, at most the first `_ROWS_LISTED`."""
    more = found.rows[len(found.examples) :]
    shown = ", ".join(map(str, more[:_ROWS_LISTED]))
    rest = f" and {len(more) - _ROWS_LISTED:,} more" if len(more) > _ROWS_LISTED else ""
    return f"row{'s' if len(more) > 1 else ''} {shown}{rest}"


def count_rows(count: int) -> str:
    """Format a count of rows, such as "1 row" or "2,000 rows"."""
    return f"{count:,} row{'' if count == 1 else 's'}"


def write_text(file: Path, text: str) -> None:
    """Write a text file in UTF-8.

    Raises:
        MRopeError: the file cannot be written.
    """
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MRopeError(f"cannot write {file}: {error.strerror or error}") from error


def _as_json(name: str, what: str, found: Findings) -> NewColumns:
    examples = [
        {"row": example.row, "message": example.message, "layout": _layout(example)}
        for example in found.examples
    ]
    return {name: what, "rows": list(found.rows), "examples": examples}


def _layout(example: RowCheck) -> NewColumns | None:
    return None if example.layout is None else asdict(example.layout)
