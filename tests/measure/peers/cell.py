"""Measure one cell of the table: a peer on a case. Needs torch, and of mrope only its reader of traces."""

from __future__ import annotations

import gc
import json
import os
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from measure.peers.flops import step_tflop, utilisation
from mrope.bench.trace import profile_steps

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
STEPS, WARM_UP, PROFILED = (11, 3, 2) if ON_GPU else (1, 1, 0)
Step = Callable[[int], torch.Tensor]
Case = dict[str, Any]


def on_device(value: Any) -> Any:
    """Copy tensors to the device, in dicts too; leave the rest."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if isinstance(value, dict):
        return {name: on_device(one) for name, one in value.items()}
    return value


@torch.no_grad()
def draw_weights(named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Draw each parameter by its name, so that every peer has the same weights."""
    for name, parameter in named:
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
        drawn = torch.empty(parameter.shape, device=parameter.device)
        drawn.normal_(float("norm" in name and name.endswith("weight")), 0.02, generator=generator)
        parameter.copy_(drawn)


def stepper(run: Any, model: Any, batches: list[Any], **more: Any) -> Step:
    """Return a step of forward and backward on batch `number`, which leaves no gradients."""

    def one_step(number: int) -> torch.Tensor:
        loss: Any = run(**batches[number % len(batches)], **more).loss
        total: Any = sum(loss.values()) if isinstance(loss, dict) else loss
        total.backward()
        model.zero_grad(set_to_none=True)
        found: torch.Tensor = total.detach()
        return found

    return one_step


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def measure(case: Case, peer: str, one_step: Step) -> dict[str, Any]:
    """Measure a cell, print it and add it to $PEERS_OUT as a line of JSON; return it.

    Median of 11 steps after 3, by CUDA events; GPU idle and kernels by a trace of two further steps;
    syncs of one step, by CUDA's debug mode; losses of two batches.
    """
    start = time.perf_counter()
    for number in range(WARM_UP):
        one_step(number)
    synchronize()
    warm_up = time.perf_counter() - start
    times, memory = _time_steps(one_step)
    traced = profile_steps(one_step, range(PROFILED)) if ON_GPU else {}
    middle = times[len(times) // 2]
    tflop = sum(step_tflop(case["config"], rows) for rows in case["batches"]) / len(case["batches"])
    found = {
        "case": case["name"],
        "peer": peer,
        "ms": round(middle, 1),
        "least_ms": round(times[0], 1),
        "syncs": count_syncs(one_step),
        "gpu_idle_share": round(traced.get("gpu_idle_share", 0.0), 4),
        "gpu_busy_ms": round(traced.get("gpu_busy_ms", 0.0), 1),
        "kernels": round(traced.get("kernels_per_step", 0.0)),
        "memory_gib": round(memory, 1),
        "tflop": round(tflop, 2),
        "utilisation": round(utilisation(tflop, middle), 4),
        "losses": [round(float(one_step(number)), 5) for number in range(2)],
        "warm_up_s": round(warm_up, 1),
    }
    write(found)
    return found


def _time_steps(one_step: Step) -> tuple[list[float], float]:
    """Return the milliseconds of each step, least first, and the peak memory in GiB."""
    if not ON_GPU:
        return [_host_ms(lambda: one_step(0))], 0.0
    torch.cuda.reset_peak_memory_stats()
    kind: Any = torch.cuda.Event
    marks = [kind(enable_timing=True) for _ in range(STEPS + 1)]
    marks[0].record()
    for number, mark in enumerate(marks[1:]):
        one_step(number)
        mark.record()
    synchronize()
    times = sorted(one.elapsed_time(other) for one, other in pairwise(marks))
    return times, torch.cuda.max_memory_allocated() / 2**30


def _host_ms(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def count_syncs(one_step: Step) -> int | None:
    """Return the syncs of a step by CUDA's own debug mode; None without CUDA."""
    if not ON_GPU:
        return None
    synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            one_step(0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(one.message) for one in found)


def attempt(case: Case, peer: str, part: Callable[[], Any]) -> None:
    """Run a part; a failure becomes the cell's result, and the next part runs."""
    try:
        part()
    except Exception as error:  # noqa: BLE001 - whatever it is, the other parts run
        traceback.print_exc(limit=-6)
        text = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        write({"case": case["name"], "peer": peer, "failed": text})
    finally:
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()


def write(line: dict[str, Any]) -> None:
    text = json.dumps(line)
    print(text, flush=True)
    if "PEERS_OUT" in os.environ:
        with Path(os.environ["PEERS_OUT"]).open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def write_versions(peer: str, *packages: str) -> None:
    """Write what a process runs on."""
    found = {"torch": str(torch.__version__)} | {name: _version(name) for name in packages}
    device = torch.cuda.get_device_name() if ON_GPU else "cpu"
    date = time.strftime("%Y-%m-%d", time.gmtime())
    write({"process": peer, "device": device, "date": date, "versions": found})
