"""Check what is read from a trace of a rank's steps."""

from __future__ import annotations

from mrope.bench.trace import DeviceEvent, split_collectives


def test_time_of_collectives_is_split_from_that_of_other_kernels() -> None:
    ms = 1_000_000
    events = [
        DeviceEvent("gemm", 0, 4 * ms),
        DeviceEvent("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 2 * ms, 7 * ms),
        DeviceEvent("Memcpy HtoD (Pinned -> Device)", 3 * ms, 4 * ms),
        DeviceEvent("gemm", 8 * ms, 10 * ms),
    ]
    split = split_collectives(events, steps=2)
    assert split.pop("gpu_idle_share") == 1 - 9 / 10
    assert split == {
        "compute_ms": 3.0,
        "collective_ms": 2.5,
        "exposed_ms": 1.5,
        "profiled_step_ms": 5.0,
    }
