"""Train twice from one seed, with the stage on and off, and compare every loss."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mrope.training.arguments import training_arguments
from mrope.training.dataloader import RowDataset, load_rows
from mrope.training.sections import Config
from mrope.training.trainer import TrainResult, run

# Sums of a padded batch, and of the same examples in one row, run in different order.
PACKED_TOLERANCE = 1e-4

# A comparison writes nothing: no checkpoint, and no log but its own table.
_DRY: dict[str, Any] = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "logging_strategy": "no",
    "load_best_model_at_end": False,
    "resume_from_checkpoint": None,
}


def compare(cfg: Config, console: Console | None = None) -> bool:
    """Train twice from one seed, with `rope.enabled` on and off, and print both side by side.

    Returns:
        Whether every loss is equal: to the last bit, or with `rope.packing` within
        `PACKED_TOLERANCE`.

    Raises:
        ConfigError, MRopeError: as `train` does.
    """
    console = console or Console()
    on, off = compare_runs(cfg)
    tolerance = 0.0 if cfg.rope.packing is None else PACKED_TOLERANCE
    pairs = [*zip(on.losses, off.losses, strict=True)]
    equal = [abs(one - other) <= tolerance for one, other in pairs]
    table = Table("batch", "loss on", "loss off", "equal?")
    for number, ((one, other), same) in enumerate(zip(pairs, equal, strict=True), 1):
        mark = "[green]yes[/]" if same else f"[red]no, by {abs(one - other):.3g}[/]"
        table.add_row(str(number), f"{one:.6f}", f"{other:.6f}", mark)
    console.print(table, _summary((on, off)))
    exactness = f"within {tolerance:g}" if tolerance else "to the last bit"
    colour = "green" if all(equal) else "red"
    verdict = f"{sum(equal)} of {len(equal)} losses are equal {exactness}"
    console.print(f"[bold {colour}]{verdict}[/]")
    return all(equal)


def compare_runs(cfg: Config) -> tuple[TrainResult, TrainResult]:
    """Return two runs over the same rows: `rope.enabled` on, and off."""
    training_arguments(cfg, **_DRY)  # raises before rows are opened, which takes long
    rows = load_rows(cfg)
    on, off = (_run_once(cfg, rows, enabled) for enabled in (True, False))
    return on, off


def _run_once(cfg: Config, rows: RowDataset, enabled: bool) -> TrainResult:
    cfg = cfg.model_copy(update={"rope": cfg.rope.model_copy(update={"enabled": enabled})})
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(cfg, **_DRY, output_dir=folder)
        result, _ = run(cfg, arguments, (rows, None), watched=True)
    return result


def _summary(runs: Sequence[TrainResult]) -> Table:
    table = Table("", "rope on", "rope off", show_header=True)
    table.add_row(
        "batches with position_ids",
        *(f"{one.positions_given} of {len(one.losses)}" for one in runs),
    )
    table.add_row("calls of get_rope_index in forward", *(_calls(one) for one in runs))
    table.add_row("host syncs in a step", *(_syncs(one) for one in runs))
    if torch.cuda.is_available():
        # On a CPU workers and model share the cores, and a difference would be noise.
        table.add_row("seconds", *(f"{one.seconds:.1f}" for one in runs))
    return table


def _calls(one: TrainResult) -> str:
    count = one.rope_index_calls
    return "not counted: the model has no get_rope_index" if count is None else str(count)


def _syncs(one: TrainResult) -> str:
    return "not watched" if one.report is None else f"{one.report.per_step:.3g}"
