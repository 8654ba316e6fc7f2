"""The two commands that look at datasets: `mrope check`, and `mrope explain --row`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mrope.check.explain import Numbered, numbered_row, show_bad_row
from mrope.check.report import Check, show, write_json
from mrope.check.rows import comparison
from mrope.check.source import load_rows
from mrope.check.summary import Summary, walk
from mrope.errors import MRopeError

if TYPE_CHECKING:
    from mrope.training.sections import Config


def run(
    cfg: Config,
    workers: int | None = None,
    json_file: Path | None = None,
    report_file: Path | None = None,
) -> Summary:
    """Look at every row of a config's dataset, with a progress bar on standard error.

    Args:
        cfg: a training config.
        workers: processes that look at rows; None: the config's `num_workers`.
        json_file, report_file: where to write what was found.

    Raises:
        MRopeError: the dataset or the model's config is not usable, or a file cannot be written.
    """
    compared, sentence = comparison(cfg.spec())
    rows = load_rows(cfg, compare=compared)
    count = cfg.dataloader.num_workers if workers is None else workers
    started = time.perf_counter()
    with _progress() as progress:
        task = progress.add_task("checking", total=len(rows), bad=0)
        summary = walk(
            rows,
            count,
            cfg.dataloader.start_method,
            lambda found: progress.update(task, completed=found.rows, bad=found.bad),
        )
    seconds = time.perf_counter() - started
    check = Check(cfg.data.source, rows.spec, compared, sentence, summary, seconds)
    show(check, Console())
    if json_file is not None:
        write_json(check, json_file)
    if report_file is not None:
        from mrope.check.html_page import write_page

        write_page(check, report_file)
    return summary


def number_row(cfg: Config, row: int) -> Numbered | None:
    """Return a row of a config's dataset with its positions; show a bad one, and return None.

    Args:
        cfg: a training config.
        row: counted from 0.

    Raises:
        MRopeError: there is no such row; the dataset or the model's config is not usable.
    """
    rows = load_rows(cfg, compare=comparison(cfg.spec())[0])
    if row >= len(rows):
        raise MRopeError(f"there is no row {row}: {cfg.data.source} has {len(rows)} rows")
    found, batch = rows.look(row)
    if found.cause is None:
        return numbered_row(rows.spec, batch)
    show_bad_row(found, rows.spec, Console())
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
