"""Measure a training step of fixed shapes on a GPU: plain, attached, compiled to one graph, captured.

    PYTHONPATH=src:tests python -m measure.one_graph 2b-mixed8,2b-crops64 [flash]
    PYTHONPATH=src:tests python -m measure.one_graph 2b-s16k checkpoint [flash]
    PYTHONPATH=src:tests python -m measure.one_graph 2b-mixed8 warm
    PYTHONPATH=src:tests python -m measure.one_graph 2b-crops64 layers
    PYTHONPATH=src:tests python -m measure.one_graph 2b-crops64 only

For each config of configs/bench: milliseconds of a step, forward and backward, by CUDA events (median
of 12 after 3); GPU idle by a trace of 3 further steps; peak memory; losses of two batches. All variants
run on the same eight batches, collated before. "captured by hand" replays one CUDA graph of the compiled
step, forward and backward; with `layers`, the model compiled layer by layer is measured too, and with
`only` nothing else that is compiled; with `flash`, a plain model under transformers' flash attention path, with torch's kernel; with
`checkpoint`, all of them under gradient checkpointing, without which 2b-s16k does not fit. With `warm`
nothing is measured: the graph is compiled into inductor's cache, so that several cases compile side by
side before they are measured one by one.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch._functorch.config
import transformers
from torch._dynamo.utils import counters

from mrope import MRopeCollator
from mrope.bench.step import step_times
from mrope.bench.trace import profile_steps
from mrope.collate.padding import PaddingCollator
from mrope.hf import attach, compile_layers, detach, explain_attention
from mrope.training.config import build_collator, load_config
from mrope.training.dataloader import load_rows
from mrope.training.model import build_model
from mrope.training.step import to_device
from support.flash import flash_attention
from support.no_syncs import no_syncs

CUDA = torch.device("cuda")
BATCHES, STEPS, WARM_UP, PROFILED = 8, 12, 3, 3
WARM_SHARE = 0.15
OVERRIDES = [f"rope.{key}=true" for key in ("enabled", "vision")]
OVERRIDES += ["model.attach=true", "dataloader.num_workers=0"]
Batch = dict[str, Any]


def step(run: Any, batch: Batch) -> torch.Tensor:
    loss: torch.Tensor = run(**batch).loss
    loss.backward()  # type: ignore[no-untyped-call]
    for parameter in run.parameters():
        parameter.grad = None
    return loss


def measure(name: str, one_step: Callable[[int], Any]) -> None:
    for number in range(WARM_UP):
        one_step(number)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    milliseconds = 1e3 * statistics.median(step_times(one_step, range(STEPS), CUDA))
    memory = torch.cuda.max_memory_allocated() / 2**30
    trace = profile_steps(one_step, range(PROFILED))
    print(
        f"{name:32s} {milliseconds:8.1f} ms   idle {100 * trace['gpu_idle_share']:5.2f} %   "
        f"busy {trace['gpu_busy_ms']:6.1f} ms   {trace['kernels_per_step']:6.0f} kernels   "
        f"{memory:.1f} GiB",
        flush=True,
    )


def measure_case(case: str, options: list[str]) -> None:
    cfg = load_config(f"configs/bench/{case}.yaml", OVERRIDES)
    rows: Any = load_rows(cfg)
    torch.manual_seed(0)
    with CUDA:
        model: Any = build_case(cfg, options)
    fixed: Any = build_collator(cfg)
    free = MRopeCollator(None, fixed.spec, fixed.vision)
    size = cfg.dataloader.batch_size
    examples = [[rows[size * number + row] for row in range(size)] for number in range(BATCHES)]
    if "warm" in options:
        compile_alone(model, to_device(fixed(examples[0]), CUDA))
        return
    plain, whole, same = (
        [to_device(collate(pair), CUDA) for pair in examples]
        for collate in (PaddingCollator(), free, fixed)
    )
    print(f"\n{case}: {fixed.shapes}", flush=True)
    measure("plain, sdpa", lambda number: step(model, plain[number % BATCHES]))
    losses = {"plain": [step(model, batch).item() for batch in plain[:2]]}
    if "flash" in options:
        measure_flash(cfg, plain, options)
        torch.cuda.empty_cache()  # of its model
    attach(model)
    print(explain_attention(model))
    measure("attached", lambda number: step(model, whole[number % BATCHES]))
    losses["attached"] = [step(model, batch).item() for batch in whole[:2]]
    measure("attached, fixed shapes", lambda number: step(model, same[number % BATCHES]))
    without_sync("attached", lambda: step(model, whole[0]))
    without_sync("attached, fixed shapes", lambda: step(model, same[0]))
    if {"layers", "only"} & {*options}:
        losses["layers"] = measure_compiled("layers compiled", compile_layers(model), same)
        attach(detach(model))
        torch._dynamo.reset()
    if "only" in options:
        print("losses of two batches:", losses, flush=True)
        return
    compiled: Any = torch.compile(model, fullgraph=True, dynamic=False)
    losses["compiled"] = measure_compiled("compiled", compiled, same)
    losses["captured by hand"] = measure_capture(compiled, same)
    torch.cuda.empty_cache()  # of the graph's pool
    print("losses of two batches:", losses, flush=True)
    detach(model)
    torch._dynamo.reset()


def measure_compiled(name: str, run: Any, batches: list[Batch]) -> list[float]:
    """Measure what compiles at its first step; return the losses of two batches."""
    before, start = counters["stats"]["unique_graphs"], time.perf_counter()
    step(run, batches[0])
    torch.cuda.synchronize()
    print(f"{name} in {time.perf_counter() - start:.0f} s", flush=True)
    measure(name, lambda number: step(run, batches[number % BATCHES]))
    losses = [step(run, batch).item() for batch in batches[:2]]
    without_sync(name, lambda: step(run, batches[1]))
    print(f"graphs for {BATCHES} batches: {counters['stats']['unique_graphs'] - before}")
    return losses


def compile_alone(model: Any, batch: Batch) -> None:
    torch.cuda.set_per_process_memory_fraction(WARM_SHARE)  # others compile on this GPU
    attach(model)
    start = time.perf_counter()
    # Raised by running the graph beside other processes; by then it is in the cache.
    with suppress(torch.OutOfMemoryError):
        run: Any = torch.compile(model, fullgraph=True, dynamic=False)
        run(**batch)
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)


def without_sync(name: str, one_step: Callable[[], Any]) -> None:
    with no_syncs(torch.device("cuda")):
        one_step()
    print(f"no sync by CUDA's own debug mode: {name}", flush=True)


def build_case(cfg: Any, options: list[str]) -> Any:
    model: Any = build_model(cfg)
    if "checkpoint" in options:
        model.gradient_checkpointing_enable()
    return model


def measure_flash(cfg: Any, plain: list[Batch], options: list[str]) -> None:
    section = cfg.model.model_copy(update={"attn_implementation": "flash_attention_2"})
    with flash_attention():
        with CUDA:
            model = build_case(cfg.model_copy(update={"model": section}), options)
        measure("plain, flash path", lambda number: step(model, plain[number % BATCHES]))


def measure_capture(run: Any, batches: list[Batch]) -> list[float]:
    """Replay one graph of forward and backward; return the losses of two batches."""
    buffers = {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in batches[0].items()
    }
    stream: Any = torch.cuda.Stream
    side = stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(run, buffers)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = run(**buffers).loss
        loss.backward()

    def replay(number: int) -> None:
        for name, value in batches[number % BATCHES].items():
            if isinstance(value, torch.Tensor):
                buffers[name].copy_(value)
        graph.replay()

    measure("captured by hand", replay)
    without_sync("captured by hand", lambda: replay(1))
    found = []
    for number in range(2):
        replay(number)
        found.append(loss.item())
    for parameter in run.parameters():
        parameter.grad = None
    return found


if __name__ == "__main__":
    # The backward is compiled with the forward, without a step that needs its memory.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    names = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{torch.cuda.get_device_name()}, {names}, {time.strftime('%Y-%m-%d', time.gmtime())}")
    for one in sys.argv[1].split(","):
        measure_case(one, sys.argv[2:])
        torch.cuda.empty_cache()
