"""Trace training steps on CUDA: how long the GPU computes, communicates, and waits for the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from mrope.columns import NewColumns

_PRODUCTS = ("gemm", "nvjet", "cutlass", "cublas", "xmma", "splitk", "mm_kernel")
_ATTENTION = ("flash", "fmha", "attention")  # whose kernels name the types of cutlass too
_LISTED = 15


class TraceEvent(NamedTuple):
    """An event of a trace; start and end are in nanoseconds since 1970."""

    name: str
    on_device: bool
    start: int
    end: int


class DeviceEvent(NamedTuple):
    """A kernel or a copy, and when it ran, in nanoseconds."""

    name: str
    start: int
    end: int


def profile_steps(step: Callable[[Any], Any], batches: Iterable[Any]) -> NewColumns:
    """Profile a step of each batch.

    Returns:
        Shares of idle time, and of matrix products in busy time; busy time, kernels and copies of a
        step; and the milliseconds a step of the kernels that take most.
    """
    ready = list(batches)
    events = trace_steps(step, ready)
    # Kernels of several streams overlap, so that their durations must not be added up.
    busy, wall = _covered(events), _wall(events)
    copies = sum(one.name.startswith("Memcpy HtoD") for one in events)
    products = [one for one in events if _is_product(one.name.lower())]
    return {
        "gpu_idle_share": 1 - busy / wall,
        "gpu_busy_ms": busy / 1e6 / len(ready),
        "profiled_step_ms": wall / 1e6 / len(ready),
        "kernels_per_step": len(events) / len(ready),
        "copies_in_step": copies / len(ready),
        "products_share": _covered(products) / busy,
        "longest_kernels_ms": _longest(events, len(ready)),
    }


def _is_product(name: str) -> bool:
    return any(part in name for part in _PRODUCTS) and not any(part in name for part in _ATTENTION)


def _longest(events: Sequence[DeviceEvent], steps: int) -> dict[str, float]:
    total: Counter[str] = Counter()
    for one in events:
        total[one.name[:100]] += one.end - one.start
    return {name: round(span / 1e6 / steps, 3) for name, span in total.most_common(_LISTED)}


def trace_steps(step: Callable[[Any], Any], batches: Sequence[Any]) -> list[DeviceEvent]:
    """Return what ran on the GPU in a step of each batch."""

    def run() -> None:
        for batch in batches:
            step(batch)

    return [
        DeviceEvent(one.name, one.start, one.end)
        for one in trace(run)
        if one.on_device and one.end > one.start
    ]


def trace(run: Callable[[], Any]) -> list[TraceEvent]:
    """Return the kernels, copies and calls of the CUDA runtime while `run` is called."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    # Without ProfilerActivity.CPU, whose records would slow the host down.
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    result: Any = profiler.profiler
    return [
        TraceEvent(
            one.name(),
            one.device_type().name == "CUDA",
            one.start_ns(),
            one.start_ns() + one.duration_ns(),
        )
        for one in result.kineto_results.events()
    ]


def split_collectives(events: Sequence[DeviceEvent], steps: int) -> dict[str, float]:
    """Return a rank's time in kernels of its own and in NCCL's, in milliseconds per step.

    Returns:
        `compute_ms`: something other than NCCL ran; `collective_ms`: a kernel of NCCL ran, which
        sends, or spins until the other ranks have come as far; `exposed_ms`: nothing else ran
        beside it; `gpu_idle_share`: nothing ran at all; `profiled_step_ms`: the whole step.
    """
    collectives = [one for one in events if "nccl" in one.name.lower()]
    compute = _covered([one for one in events if "nccl" not in one.name.lower()])
    busy, wall = _covered(events), _wall(events)
    return {
        "compute_ms": compute / 1e6 / steps,
        "collective_ms": _covered(collectives) / 1e6 / steps,
        "exposed_ms": (busy - compute) / 1e6 / steps,
        "gpu_idle_share": 1 - busy / wall,
        "profiled_step_ms": wall / 1e6 / steps,
    }


def covered_length(spans: list[tuple[int, int]]) -> float:
    """Return the length of a union of intervals: of (0, 2), (1, 3) and (5, 6) it is 4."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def _covered(events: Sequence[DeviceEvent]) -> float:
    return covered_length([(one.start, one.end) for one in events])


def _wall(events: Sequence[DeviceEvent]) -> float:
    return max(one.end for one in events) - min(one.start for one in events)
