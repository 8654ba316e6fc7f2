"""Run `mrope check` and `mrope explain --row`, the two commands that read a dataset."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mrope.check.explain import SamplePositions, compute_row_positions, print_bad_row
from mrope.check.fit_shapes import propose_ladder, require_fixed_shapes
from mrope.check.report import Check, print_report, write_json
from mrope.check.rows import describe_comparison
from mrope.check.source import open_rows
from mrope.check.summary import Summary, check_rows
from mrope.errors import MRopeError

if TYPE_CHECKING:
    from mrope.training.sections import Config


def check_dataset(
    cfg: Config,
    workers: int | None = None,
    json_file: Path | None = None,
    report_file: Path | None = None,
    *,
    shapes: bool = False,
) -> Summary:
    """Check every row of a config's dataset and print the report; progress goes to standard error.

    Args:
        cfg: a training config.
        workers: worker processes; None: the config's `num_workers`.
        json_file, report_file: where to write the results as JSON and as an HTML page.
        shapes: propose a ladder of fixed shapes for the good rows.

    Raises:
        MRopeError: the dataset or the model's config is not usable, or a file cannot be written;
            with `shapes`, a model whose batches cannot have fixed shapes, or too few good rows.
    """
    if shapes:
        require_fixed_shapes(cfg)  # before minutes of checking
    compared, sentence = describe_comparison(cfg.spec())
    rows = open_rows(cfg, compare=compared)
    count = cfg.dataloader.num_workers if workers is None else workers
    started = time.perf_counter()
    with _progress() as progress:
        task = progress.add_task("checking", total=len(rows), bad=0)
        summary = check_rows(
            rows,
            count,
            cfg.dataloader.start_method,
            lambda found: progress.update(task, completed=found.rows, bad=found.bad),
        )
    seconds = time.perf_counter() - started
    # An interrupted check has seen some of the rows only.
    proposal = propose_ladder(cfg, summary) if shapes and summary.stopped is None else None
    check = Check(cfg.data.source, rows.spec, compared, sentence, summary, seconds, proposal)
    print_report(check, Console())
    if json_file is not None:
        write_json(check, json_file)
    if report_file is not None:
        from mrope.check.html_page import write_page

        write_page(check, report_file)
    return summary


def explain_row(cfg: Config, row: int) -> SamplePositions | None:
    """Compute the position ids of one row of a config's dataset; print a bad row, and return None.

    Args:
        cfg: a training config.
        row: index of the row, from 0.

    Raises:
        MRopeError: the dataset has no such row; the dataset or the model's config is not usable.
    """
    rows = open_rows(cfg, compare=describe_comparison(cfg.spec())[0])
    if row >= len(rows):
        raise MRopeError(f"there is no row {row}: {cfg.data.source} has {len(rows)} rows")
    found, batch = rows.check_row(row)
    if found.cause is None:
        return compute_row_positions(rows.spec, batch)
    print_bad_row(found, rows.spec, Console())
    return None


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[bad]} bad"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
