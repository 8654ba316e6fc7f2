"""How the benches time functions: in turns, on one thread, with warm caches."""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

_TURN_SECONDS = 0.004


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread until the end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def interleaved_medians(
    contenders: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, float]:
    """Return the median seconds of a call of each function.

    In each repeat every function has its turn, in which it is called as often as fits into a few
    milliseconds: a disturbance meets all of them, and all of them meet warm caches.
    """
    timers = {name: timeit.Timer(function) for name, function in contenders.items()}
    calls = {
        name: max(1, int(_TURN_SECONDS / max(timer.timeit(1), 1e-7)))
        for name, timer in timers.items()
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, timer in timers.items():
            times[name].append(timer.timeit(calls[name]) / calls[name])
    return {name: statistics.median(values) for name, values in times.items()}
