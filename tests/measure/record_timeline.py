"""Record what host and GPU do in steps of a config, for the picture of the docs.

    PYTHONPATH=src:tests python -m measure.record_timeline OUT.json [CONFIG] [KEY=VALUE ...]

Variants: the plain model; the attached one; and, on CUDA with `rope.shapes`, a replay of one graph of the
compiled step, forward and backward. Each runs on the same batches, collated and copied before. OUT.json has,
for each, milliseconds of a step and the GPU's idle share (of a trace), and the timeline of three steps, in the form
of `measure.timeline`. The default config is configs/bench/2b-mixed8.yaml. Without CUDA the lanes of the GPU
are empty: this proves the script, on a small config.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config

from measure.timeline import Mark, record_timeline
from mrope import MRopeCollator
from mrope.bench.harness import conditions
from mrope.bench.trace import profile_steps
from mrope.collate.padding import PaddingCollator
from mrope.hf import attach
from mrope.training.config import build_collator, load_config
from mrope.training.dataloader import load_rows
from mrope.training.model import build_model
from mrope.training.step import to_device

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCHES, WARM_UP, STEPS, DRAWN = 8, 3, 12, 3
MOST_BYTES = 200_000
OVERRIDES = ["rope.enabled=true", "rope.vision=true", "model.attach=true"]
Batch = dict[str, Any]
Step = Callable[[Batch, Mark], Any]


def main(words: list[str]) -> None:
    out, config, *overrides = [*words, "configs/bench/2b-mixed8.yaml"][: max(2, len(words))]
    cfg = load_config(config, [*OVERRIDES, *overrides])
    torch.manual_seed(0)
    with DEVICE:
        model: Any = build_model(cfg)
    fixed: Any = build_collator(cfg)
    examples = examples_of(cfg)
    plain, whole, same = (
        [to_device(collate(rows), DEVICE) for rows in examples]
        for collate in (PaddingCollator(), MRopeCollator(None, fixed.spec, fixed.vision), fixed)
    )
    variants = {"plain": measure("plain", partial(step, model), plain)}
    attach(model)
    variants["attached"] = measure("attached", partial(step, model), whole)
    if DEVICE.type == "cuda" and cfg.rope.shapes is not None:
        variants["captured"] = measure("captured", capture(model, same[0]), same)
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "none"
    table = {"config": config, "steps": DRAWN, "device": device, **conditions()}
    text = json.dumps({**table, "variants": variants}, separators=(",", ":"))
    if len(text) > MOST_BYTES:
        raise SystemExit(f"{len(text)} bytes, more than {MOST_BYTES}")
    Path(out).write_text(text + "\n", encoding="utf-8")


def examples_of(cfg: Any) -> list[list[Any]]:
    rows: Any = load_rows(cfg)
    size = cfg.dataloader.batch_size
    return [[rows[size * batch + row] for row in range(size)] for batch in range(BATCHES)]


def step(run: Any, batch: Batch, mark: Mark) -> None:
    with mark("forward"):
        loss = run(**batch).loss
    with mark("backward"):
        loss.backward()
    for parameter in run.parameters():
        parameter.grad = None


def capture(model: Any, batch: Batch) -> Step:
    """Return a step that replays one CUDA graph of forward and backward, compiled."""
    # As in one_graph.py, so that the graph is the one in inductor's cache.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    run: Any = torch.compile(model, fullgraph=True, dynamic=False)
    buffers = {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
    stream: Any = torch.cuda.Stream
    side = stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run(**buffers).loss.backward()
            for parameter in run.parameters():
                parameter.grad = None
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(**buffers).loss.backward()

    def replay(batch: Batch, mark: Mark) -> None:
        with mark("copies"):
            for name, value in batch.items():
                if isinstance(value, torch.Tensor):
                    buffers[name].copy_(value)
        with mark("replay"):
            graph.replay()

    return replay


def measure(name: str, one_step: Step, batches: list[Batch]) -> dict[str, Any]:
    def unmarked(number: int) -> None:
        one_step(batches[number % BATCHES], lambda name: nullcontext())

    for number in range(WARM_UP):
        unmarked(number)
    synchronize()
    start = time.perf_counter()
    for number in range(STEPS):  # back to back, as in training
        unmarked(number)
    synchronize()
    found: dict[str, Any] = {"step_ms": round(1e3 * (time.perf_counter() - start) / STEPS, 2)}
    if DEVICE.type == "cuda":
        found["gpu_idle_share"] = round(profile_steps(unmarked, range(DRAWN))["gpu_idle_share"], 4)
    lanes = record_timeline(one_step, batches[:DRAWN])
    counts = {lane: len(intervals) for lane, intervals in lanes.items()}
    print(name, found, counts, flush=True)
    return found | {
        lane: [(round(start, 3), round(end, 3), what) for start, end, what in intervals]
        for lane, intervals in lanes.items()
    }


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1:])
