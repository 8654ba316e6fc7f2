"""Read when the host works, when it syncs and when the GPU computes, from a profiler trace.

`record_timeline` profiles steps; `tests/measure/peers/ours.py` records those of a case of its table,
and `tests/support/pictures.py` draws them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias

import torch

from mrope.bench.trace import TraceEvent, trace

Interval: TypeAlias = tuple[float, float, str]
Timeline: TypeAlias = dict[str, list[Interval]]
Mark: TypeAlias = Callable[[str], AbstractContextManager[None]]

# Calls of CUDA's runtime and driver that return when the device is done; HIP's have the same ends.
_SYNCS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize", "CtxSynchronize")
MOST_INTERVALS = 1500


def record_timeline(step: Callable[[Any, Mark], Any], batches: Iterable[Any]) -> Timeline:
    """Profile a step of each batch, one after another without a sync between them.

    Args:
        step: called with a batch and with `mark`; `with mark("forward"):` names what the host does.
        batches: of the profiled steps; run some before, for compilation and allocations.

    Returns:
        What `read_timeline` returns. Without CUDA, "gpu" and "syncs" are empty.
    """
    host: list[TraceEvent] = []

    @contextmanager
    def mark(name: str) -> Iterator[None]:
        start = time.time_ns()
        yield
        host.append(TraceEvent(name, False, start, time.time_ns()))

    def run() -> None:
        for batch in batches:
            step(batch, mark)

    if not torch.cuda.is_available():
        run()
        return read_timeline(host, [])
    # Ranges of the host are marked by hand, by the clock that the trace has its times from.
    return read_timeline(host, trace(run))


def read_timeline(host: Sequence[TraceEvent], events: Sequence[TraceEvent]) -> Timeline:
    """Return what the host and the GPU did, in milliseconds since the first range of the host.

    Args:
        host: ranges of the host, at least one.
        events: of the trace: kernels, copies, and calls of the runtime.

    Returns:
        Three lists of (start, end, name), each ordered by start:

        - "host": the ranges;
        - "gpu": kernels and copies, joined where they overlap or where the gap is too small to
          draw, so that there are at most `MOST_INTERVALS`;
        - "syncs": calls before the end of the last range that waited for the device, on any thread.

    Raises:
        ValueError: the device did nothing while the host's ranges ran: the clocks differ.
    """
    origin, last = min(one.start for one in host), max(one.end for one in host)
    device = [one for one in events if one.on_device and one.end > one.start]
    if device and not any(origin <= one.start <= last for one in device):
        raise ValueError("no kernel starts within the host's ranges: the clocks differ")
    waits = [one for one in events if not one.on_device and one.name.endswith(_SYNCS)]

    def interval(one: TraceEvent, name: str) -> Interval:
        return ((one.start - origin) / 1e6, (one.end - origin) / 1e6, name)

    return {
        "host": sorted(interval(one, one.name) for one in host),
        "gpu": _join_few([interval(one, "gpu") for one in device]),
        "syncs": sorted(interval(one, one.name) for one in waits if origin <= one.start < last),
    }


def _join_few(intervals: list[Interval]) -> list[Interval]:
    """Join intervals, across gaps that double until few enough are left."""
    joined, gap = _join(intervals, 0.0), 0.002
    while len(joined) > MOST_INTERVALS:
        joined, gap = _join(joined, gap), 2 * gap
    return joined


def _join(intervals: list[Interval], gap: float) -> list[Interval]:
    joined: list[Interval] = []
    for start, end, name in sorted(intervals):
        if joined and start - joined[-1][1] <= gap:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]), name)
        else:
            joined.append((start, end, name))
    return joined
