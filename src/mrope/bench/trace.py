"""Trace training steps on CUDA: how long the GPU is busy, and how long it waits for the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


def profile_steps(step: Callable[[Any], Any], batches: Iterable[Any]) -> dict[str, float]:
    """Profile a step of each batch; return idle share, busy time, kernels and copies per step."""
    from torch.profiler import ProfilerActivity, profile

    ready = list(batches)
    torch.cuda.synchronize()
    # Without ProfilerActivity.CPU, whose records would slow the host down.
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for batch in ready:
            step(batch)
        torch.cuda.synchronize()
    result: Any = profiler.profiler
    events = [one for one in result.kineto_results.events() if one.duration_ns()]
    on_device = [one for one in events if one.device_type().name == "CUDA"]
    spans = [(one.start_ns(), one.start_ns() + one.duration_ns()) for one in on_device]
    # Kernels of several streams overlap, so that their durations must not be added up.
    busy = covered_length(spans)
    wall = max(end for _, end in spans) - min(start for start, _ in spans)
    copies = sum(one.name().startswith("Memcpy HtoD") for one in on_device)
    return {
        "gpu_idle_share": 1 - busy / wall,
        "gpu_busy_ms": busy / 1e6 / len(ready),
        "profiled_step_ms": wall / 1e6 / len(ready),
        "kernels_per_step": len(spans) / len(ready),
        "copies_in_step": copies / len(ready),
    }


def covered_length(spans: list[tuple[int, int]]) -> float:
    """Return the length of a union of intervals: of (0, 2), (1, 3) and (5, 6) it is 4."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
