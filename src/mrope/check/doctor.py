"""Compare every family with the installed transformers, on any release, and print a table."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import transformers
from rich.console import Console
from rich.table import Table

from mrope.check.engine import compare_engine
from mrope.check.slow_steps import list_slow_parts
from mrope.hf.rows import ROWS
from mrope.proof.comparisons import Verdict, compare
from mrope.proof.small_models import FAILURES, default_model, describe_error
from mrope.spec.families import FAMILIES, ONE_DIMENSIONAL
from mrope.spec.references import resolve_reference
from mrope.spec.spec import MRopeSpec, example_config

if TYPE_CHECKING:
    from mrope.training.sections import Config

COMPARED = {**FAMILIES, **ONE_DIMENSIONAL}
FEATURES = ("positions", "attach", "flatten")
_WORDS = {True: "equal", False: "NOT equal", None: "not compared"}
_STYLES = {True: "green", False: "red", None: "yellow"}


def compare_families(json_file: Path | None = None, cfg: Config | None = None) -> bool:
    """Print a table of all families, each difference, and what makes steps slow on this machine.

    Args:
        json_file: the verdicts are written there too.
        cfg: a training config, whose settings are looked at too.

    Returns:
        Whether no family differs.
    """
    verdicts = {family: compare_family(family) for family in COMPARED}
    console = Console()
    console.print(_table(verdicts))
    for family, row in verdicts.items():
        for feature, verdict in row.items():
            if not verdict.equal:
                console.print(f"{family} {feature}: {verdict.detail}", markup=False)
    slow = list(list_slow_parts(cfg))
    for line in slow:
        console.print(f"slow: {line}", markup=False, highlight=False, soft_wrap=True)
    if json_file is not None:
        result = {
            family: {name: vars(one) for name, one in row.items()}
            for family, row in verdicts.items()
        }
        found = {"transformers": transformers.__version__, "families": result, "slow": slow}
        json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return all(one.equal is not False for row in verdicts.values() for one in row.values())


def print_engine(engine: str) -> None:
    """Print what an installed engine's own function gives for each family, images and clips."""
    found, console = compare_engine(engine), Console()
    if not found:
        console.print(f"{engine} is not installed: nothing was compared")
        return
    table = Table(title=f"mrope and {engine} {importlib.metadata.version(engine)}")
    for column in ("family", "images", "clips"):
        table.add_column(column)
    for family, verdicts in found.items():
        table.add_row(family, *verdicts.values())
    console.print(table)


def compare_family(family: str) -> dict[str, Verdict]:
    """Return the verdict on each feature that mrope has for a family."""
    return dict(_verdicts(family))


def _verdicts(family: str) -> Iterator[tuple[str, Verdict]]:
    row = COMPARED[family]
    try:
        spec = MRopeSpec.from_config(example_config(family), resolve_reference())
    except FAILURES as error:
        yield "positions", Verdict(None, f"not compared: {describe_error(error)}")
        return
    if not row.one_dimensional:
        yield "positions", compare("positions", spec)
    if family in ROWS:
        try:
            model = default_model(family)
        except FAILURES as error:
            yield "attach", Verdict(None, f"not compared: {describe_error(error)}")
        else:
            yield "attach", compare("attach", model)
    if row.packs:
        yield "flatten", compare("flatten", spec)


def _table(verdicts: dict[str, dict[str, Verdict]]) -> Table:
    table = Table(title=f"mrope and transformers {transformers.__version__}")
    for column in ("family", *FEATURES):
        table.add_column(column, no_wrap=True)
    for family, row in verdicts.items():
        cells = [
            f"[{_STYLES[row[name].equal]}]{_WORDS[row[name].equal]}" if name in row else "-"
            for name in FEATURES
        ]
        table.add_row(family, *cells)
    return table
