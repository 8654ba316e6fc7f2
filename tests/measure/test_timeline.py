"""What a timeline keeps of a trace, and what it leaves out."""

from __future__ import annotations

import pytest
import torch

from measure import timeline
from measure.timeline import Mark, read_timeline, record_timeline
from mrope.bench.trace import TraceEvent

MS = 1_000_000
HOST = [
    TraceEvent("backward", False, 14 * MS, 20 * MS),
    TraceEvent("forward", False, 10 * MS, 14 * MS),
]
EVENTS = [
    TraceEvent("cudaLaunchKernel", False, 11 * MS, 12 * MS),
    TraceEvent("cudaStreamSynchronize", False, 12 * MS, 13 * MS),
    TraceEvent("cudaDeviceSynchronize", False, 21 * MS, 26 * MS),  # after the last step
    TraceEvent("gemm", True, 15 * MS, 16 * MS),
    TraceEvent("gemm", True, 11 * MS, 12 * MS),
    TraceEvent("Memcpy DtoH (Device -> Pageable)", True, 12 * MS, 13 * MS),
]


def test_a_trace_becomes_three_lanes() -> None:
    assert read_timeline(HOST, EVENTS) == {
        "host": [(0, 4, "forward"), (4, 10, "backward")],
        "gpu": [(1, 3, "gpu"), (5, 6, "gpu")],
        "syncs": [(2, 3, "cudaStreamSynchronize")],
    }


def test_small_gaps_are_joined_until_few_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "MOST_INTERVALS", 2)
    kernels = [TraceEvent("k", True, start, start + 900) for start in (0, 1000, 2000, 9 * MS)]
    lanes = read_timeline([TraceEvent("step", False, 0, MS)], kernels)
    assert [(round(start, 4), round(end, 4)) for start, end, _ in lanes["gpu"]] == [
        (0, 0.0029),
        (9, 9.0009),
    ]


def test_a_trace_of_another_clock_is_refused() -> None:
    late = [one._replace(start=one.start + 10**12, end=one.end + 10**12) for one in EVENTS]
    with pytest.raises(ValueError, match="the clocks differ"):
        read_timeline(HOST, late)


def test_ranges_of_the_host_are_marked_on_a_cpu_too() -> None:
    def step(number: int, mark: Mark) -> None:
        with mark("forward"):
            torch.ones(number).sum().item()

    lanes = record_timeline(step, [2, 3])
    assert [name for _, _, name in lanes["host"]] == ["forward", "forward"]
    assert lanes["host"][0][1] <= lanes["host"][1][0]
    assert lanes["gpu"] == lanes["syncs"] == []
