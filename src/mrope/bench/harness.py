"""Shared parts of the benchmarks: conditions, timers, and output as a table, JSON or a picture."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mrope.columns import Columns

_TURN_SECONDS = 0.004
# Float64 values of 40 MB, more than a core's caches hold.
_CACHES = 5 * 2**20
# Wider than any table, so that no cell wraps in a file or a pipe, where rich assumes 80 columns.
_PIPE_WIDTH = 1000


def conditions() -> dict[str, str]:
    """Return date (UTC), processor, cores and versions; every committed result carries them."""
    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else "?",
        "python": platform.python_version(),
    }
    return found | {name: _version(name) for name in ("mrope", "numpy", "torch", "transformers")}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    # `platform.processor()` is empty or only the architecture on Linux.
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread within the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def interleaved_medians(
    contenders: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, float]:
    """Return the median seconds per call of each function.

    In each of `repeats` rounds every function is timed once, over as many calls as take about 4 ms.
    """
    timers = {name: timeit.Timer(function) for name, function in contenders.items()}
    calls = {
        name: max(1, int(_TURN_SECONDS / max(timer.timeit(1), 1e-7)))
        for name, timer in timers.items()
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    # Interleaved, so that a busy machine slows every function alike and the ratios stay; several
    # calls a turn, so that each function runs with warm caches.
    for _ in range(repeats):
        for name, timer in timers.items():
            times[name].append(timer.timeit(calls[name]) / calls[name])
    return {name: statistics.median(values) for name, values in times.items()}


def medians_after_other_work(
    contenders: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, float]:
    """Return the median seconds of single calls, before each of which 40 MB are written.

    A worker's call comes after it has decoded and copied pixels, which leave nothing of its last
    call in the processor's caches.
    """
    other_work = np.zeros(_CACHES)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, function in contenders.items():
            other_work += 1
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def make_console() -> Console:
    """Return a console for standard output, which wraps lines only on a terminal."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def make_table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    """Return an empty table: text columns, aligned left, then number columns, aligned right."""
    table = Table(title=title)
    for heading in texts:
        table.add_column(heading)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def microseconds(seconds: float | None) -> str:
    """Format a time for a table; None, for a rival that is not installed, gives "-"."""
    return "-" if seconds is None else f"{seconds * 1e6:,.0f} µs"


def one_line(values: Mapping[str, str]) -> str:
    """Return the conditions of a report as one line."""
    return ", ".join(f"{key} {value}" for key, value in values.items())


def write_json(report: Columns, file: Path | None) -> None:
    """Write a report; None writes nothing."""
    if file is not None:
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


@contextmanager
def figure_file(
    file: Path, size: tuple[float, float], *shape: int, **options: Any
) -> Iterator[Any]:
    """Yield a matplotlib figure and its axes, and save the figure to `file` after the block.

    Args:
        size: width and height in inches.
        shape: rows and columns of axes.
        options: further keywords of `matplotlib.pyplot.subplots`.
    """
    import matplotlib as mpl

    mpl.use("Agg")  # draws without a display
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(*shape, figsize=size, layout="constrained", **options)
    yield figure, axes
    figure.savefig(file, dpi=120)
    plt.close(figure)
