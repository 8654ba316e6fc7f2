"""Measure training over all GPUs of a host: plain, attached, compiled; batches by tokens and by work.

    PYTHONPATH=src:tests python -m torch.distributed.run --standalone --nproc-per-node 8 \
        -m measure.ranks OUT.json [--how DDP,FSDP2] [--variants plain,attached,...]
    PYTHONPATH=src:tests python -m torch.distributed.run --standalone --nproc-per-node 2 \
        -m measure.ranks OUT.json --tiny --tokens 1024 --steps 4     # on a CPU, over gloo

A Qwen3-VL of 2B shape with random weights, bfloat16, gradient checkpointing and fused AdamW, trained on
the mix of `python -m measure balance`. One epoch of the same examples is planned by tokens and by work, and its
batches are collated and copied to the device before anything is timed. Variants:

- plain: transformers' own forward, sdpa. Rows are flattened and come with position ids, as trainers that
  pack prepare them: padded rows of the same examples would be several times as long;
- plain-flash: the same under transformers' flash attention path, with torch's kernel (support.flash);
- attached, shapes, compiled: attached, with one ladder of shapes, and compiled: under DDP as one graph,
  under FSDP2 layer by layer;
- reduced: compiled with mode="reduce-overhead"; captured: forward, backward and DDP's collectives
  replayed as one CUDA graph. DDP alone: FSDP2 gathers weights into memory whose addresses change.

One model is trained on both plans, by tokens first, for each way to wrap it and each variant. Every case
has the steps' times by CUDA events, and the samples per second of an epoch; of each rank, from a trace of
the first steps, the time in its own kernels and in NCCL's, and GPU idle; the mean loss over the ranks of
the first steps, and how far it is from that of the first variant. The JSON and a text beside it are
written after each case. A failure ends its process, and torch.distributed.run ends the others.

A 2B step of 16k tokens takes about a second, and a case about 4 steps, an epoch and the traced steps:
choose variants and --steps by the time there is. Compiling 2B takes minutes, and seconds from inductor's
cache: run with --warm before, and keep TORCHINDUCTOR_CACHE_DIR.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.distributed as dist
import transformers
from torch._dynamo.utils import counters
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from measure.rank_batches import BALANCES, Epoch, qwen3_vl_config
from mrope.bench.trace import split_collectives, trace_steps
from mrope.hf import attach
from mrope.training.step import finish, to_device
from support.flash import flash_attention

VARIANTS = ("plain", "plain-flash", "attached", "shapes", "compiled", "reduced", "captured")
COMPILED = ("compiled", "reduced", "captured")
LOSSES = 4  # of the first steps, which warm up kernels and the allocator too
LEARNING_RATE = 1e-5
# DDP has to have run so often before its collectives can be captured.
BEFORE_CAPTURE = 11
Batch = dict[str, Any]


def read_options(words: list[str]) -> argparse.Namespace:
    def listed(choices: tuple[str, ...]) -> dict[str, Any]:
        def split(text: str) -> list[str]:
            if unknown := set(text.split(",")) - set(choices):
                raise argparse.ArgumentTypeError(f"{unknown}: choose from {choices}")
            return text.split(",")

        return {"type": split, "metavar": ",".join(choices)}

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("file", type=Path)
    parser.add_argument("--how", default=["DDP", "FSDP2"], **listed(("DDP", "FSDP2")))
    parser.add_argument("--variants", default=["plain", "attached", "shapes"], **listed(VARIANTS))
    parser.add_argument("--balance", default=list(BALANCES), **listed(BALANCES))
    parser.add_argument("--steps", type=int, default=16, help="steps of the epoch, about")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of a rank's batch")
    parser.add_argument("--layers", type=int, help="of text model and tower")
    parser.add_argument("--graphs", type=int, default=1, help="most pairs of rungs of the ladder")
    parser.add_argument("--traced", type=int, default=6, help="first steps of the epoch to trace")
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "sgd"))
    parser.add_argument("--tiny", action="store_true", help="two narrow layers, for CPUs")
    parser.add_argument("--warm", action="store_true", help="compile into the cache, and stop")
    return parser.parse_args(words)


@dataclass(frozen=True)
class World:
    """The ranks, and what they share."""

    options: argparse.Namespace
    device: torch.device
    config: Batch
    rank: int = field(default_factory=dist.get_rank)
    size: int = field(default_factory=dist.get_world_size)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def say(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)

    def gathered(self, value: Any) -> list[Any]:
        """Return the value of every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


# Models


def make_model(world: World, variant: str) -> Any:
    """Return the same model on every rank, attached if the variant is."""
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForImageTextToText
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(world.config)))
    attention = "flash_attention_2" if variant == "plain-flash" else "sdpa"
    dtype = torch.bfloat16 if world.on_gpu else torch.float32
    with world.device:  # initialising large models on the CPU takes minutes
        model = auto.from_config(config, attn_implementation=attention, dtype=dtype).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model if variant.startswith("plain") else attach(model)


def wrap(model: Any, how: str, variant: str) -> Any:
    """Return a module of which each rank runs its own batch."""
    if how == "DDP":
        if variant in COMPILED:
            # The graph stays whole: DDP's optimizer would cut it into buckets.
            torch._dynamo.config.optimize_ddp = False
            mode = "reduce-overhead" if variant == "reduced" else None
            model = torch.compile(model, fullgraph=True, dynamic=False, mode=mode)
        with side_stream() if variant == "captured" else nullcontext():
            return DistributedDataParallel(model, gradient_as_bucket_view=True)
    for layer in (*model.model.visual.blocks, *model.model.language_model.layers):
        if variant == "compiled":  # FSDP2's hooks stand between layers: each is a graph of its own
            layer.compile(fullgraph=True, dynamic=False)
        fully_shard(layer)
    fully_shard(model.model.visual)
    fully_shard(model)
    return model


@contextmanager
def side_stream() -> Iterator[None]:
    """Run the block on another stream, which capturing needs, before and after all other work."""
    stream: Any = torch.cuda.Stream
    side = stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)


def make_optimizer(world: World, run: Any) -> Any:
    kind = torch.optim.AdamW if world.options.optimizer == "adamw" else torch.optim.SGD
    return kind(run.parameters(), LEARNING_RATE, fused=world.on_gpu)


def make_step(
    run: Any, variant: str, optimizer: Any, batch: Batch
) -> Callable[[Batch], torch.Tensor]:
    """Return a function that trains on a batch and returns its loss."""
    if variant == "captured":
        return captured_step(run, optimizer, batch)

    def step(batch: Batch) -> torch.Tensor:
        if variant == "reduced":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        loss = run(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=variant != "reduced")
        return loss.detach().clone()  # type: ignore[no-any-return]

    return step


def captured_step(run: Any, optimizer: Any, first: Batch) -> Callable[[Batch], torch.Tensor]:
    """Capture forward, backward and DDP's collectives; the optimizer runs after a replay."""
    buffers = {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in first.items()
    }
    with side_stream():
        for _ in range(BEFORE_CAPTURE):
            run(**buffers).loss.backward()
            optimizer.zero_grad(set_to_none=False)
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog queries events from a thread of its own.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        optimizer.zero_grad(set_to_none=False)
        loss = run(**buffers).loss
        loss.backward()

    def step(batch: Batch) -> torch.Tensor:
        for name, value in batch.items():
            if isinstance(value, torch.Tensor):
                buffers[name].copy_(value)
        graph.replay()
        optimizer.step()
        return loss.detach().clone()  # type: ignore[no-any-return]

    return step


# Measurements


def measure(
    world: World, epoch: Epoch, step: Any, batches: list[Batch], first: torch.Tensor
) -> Batch:
    """Train on the first batches, time an epoch, and trace some steps.

    Args:
        first: loss of a step on the first batch, which was trained on before.
    """
    losses = [first, *(step(batch) for batch in batches[1:LOSSES])]
    mean = torch.stack(losses).float()
    dist.all_reduce(mean)
    if world.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = step_times(world, step, batches)
    own: Batch = {"step_ms": 1e3 * statistics.median(times)}
    if world.on_gpu:
        own["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        dist.barrier()
        traced = batches[: world.options.traced]
        own |= split_collectives(trace_steps(step, traced), len(traced))
    ranks = world.gathered({**own, "epoch_seconds": sum(times)})
    seconds = max(rank["epoch_seconds"] for rank in ranks)
    return {
        "graphs_compiled": counters["stats"]["unique_graphs"],
        "step_ms": max(rank["step_ms"] for rank in ranks),
        "epoch_seconds": seconds,
        "samples_per_second": len(epoch.examples_N) / seconds,
        "tflop_per_second_of_a_rank": epoch.work_N.sum() / 1e12 / seconds / world.size,
        "losses": (mean / world.size).tolist(),
        "ranks": ranks,
    }


def step_times(world: World, step: Any, batches: list[Batch]) -> list[float]:
    """Return the seconds from each step to the next, over an epoch."""
    finish(world.device)
    dist.barrier()
    marks: list[Any] = []
    for batch in (*batches, None):
        if world.on_gpu:
            event: Any = torch.cuda.Event
            marks.append(event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())
        if batch is not None:
            step(batch)
    finish(world.device)
    if world.on_gpu:
        return [one.elapsed_time(other) / 1e3 for one, other in pairwise(marks)]
    return [other - one for one, other in pairwise(marks)]


def measure_variant(world: World, epoch: Epoch, how: str, variant: str) -> Iterator[Batch]:
    """Yield the case of each balance; one model is trained on both, in this order."""
    with flash_attention() if variant == "plain-flash" else nullcontext():
        run = wrap(make_model(world, variant), how, variant)
        step = None
        for balance in world.options.balance:
            start = time.perf_counter()
            shapes = epoch.shapes if variant in ("shapes", *COMPILED) else None
            collated = epoch.batches(balance, world.rank, not variant.startswith("plain"), shapes)
            batches = [to_device(batch, world.device) for batch in collated]
            step = step or make_step(run, variant, make_optimizer(world, run), batches[0])
            first = step(batches[0])
            finish(world.device)
            world.say(f"first step by {balance} after {time.perf_counter() - start:.0f} s")
            if world.options.warm:
                return
            name = {"how": how, "variant": variant, "balance": balance}
            yield name | measure(world, epoch, step, batches, first)
    torch._dynamo.reset()
    counters.clear()


def compare_losses(case: Batch, cases: list[Batch]) -> None:
    """Add the largest difference from the losses of the first case on the same batches."""
    first = next(one for one in (*cases, case) if one["balance"] == case["balance"])
    pairs = zip(case["losses"], first["losses"], strict=True)
    case["largest_loss_difference"] = max(abs(one - other) for one, other in pairs)


def line_of(case: Batch) -> str:
    """Return a case as a line of text; times of ranks in their order."""
    parts = [
        f"{case['how']:5s} {case['variant']:11s} by {case['balance']:6s}",
        f"step {case['step_ms']:8.1f} ms",
        f"{case['samples_per_second']:7.2f} samples/s",
        f"loss {case['losses'][0]:.4f}, apart {case['largest_loss_difference']:.1e}",
    ]
    if "compute_ms" in case["ranks"][0]:
        for name, shown in (("compute_ms", "compute"), ("exposed_ms", "NCCL alone")):
            parts.append(shown + " " + " ".join(f"{one[name]:.0f}" for one in case["ranks"]))
        idle = max(one["gpu_idle_share"] for one in case["ranks"])
        peak = max(one["peak_gib"] for one in case["ranks"])
        parts.append(f"idle at most {100 * idle:.1f} %, {peak:.1f} GiB")
    return " | ".join(parts)


def write(report: Batch, file: Path) -> None:
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    lines = [line_of(case) for case in report["cases"]]
    heading = ", ".join(f"{name} {value}" for name, value in report["conditions"].items())
    file.with_suffix(".txt").write_text("\n".join([heading, *lines, ""]), encoding="utf-8")


def conditions(world: World) -> dict[str, str]:
    return {
        "device": torch.cuda.get_device_name() if world.on_gpu else "cpu",
        "ranks": str(world.size),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def main(words: list[str]) -> None:
    options = read_options(words)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    # The backward is compiled with the forward, so that the first step tells all of it.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    if "captured" in options.variants:
        # NCCL's watchdog must not ask after a collective while it is captured.
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    dist.init_process_group("nccl" if on_gpu else "gloo")
    world = World(options, device, qwen3_vl_config(options.tiny, options.layers))
    dtype = torch.bfloat16 if on_gpu else torch.float32
    epoch = Epoch(world.config, world.size, options.tokens, options.steps, options.graphs, dtype)
    plans = {balance: epoch.describe(balance) for balance in BALANCES}
    told = {name: str(value) for name, value in vars(options).items() if name != "file"}
    report: Batch = {"conditions": conditions(world), "options": told, "shapes": str(epoch.shapes)}
    report |= {"plans": plans, "cases": []}
    world.say(f"{report['conditions']}\n{epoch.shapes}\n{json.dumps(plans, indent=1)}")
    for how in options.how:
        for variant in options.variants:
            if how == "FSDP2" and variant in ("reduced", "captured"):
                world.say(f"FSDP2 {variant}: not run")
                continue
            world.say(f"{how} {variant} ...")
            for case in measure_variant(world, epoch, how, variant):
                compare_losses(case, report["cases"])
                report["cases"].append(case)
                world.say(line_of(case))
                if world.rank == 0:
                    write(report, options.file)
            if on_gpu:  # two models with their gradients and moments may not fit
                gc.collect()
                torch.cuda.empty_cache()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
