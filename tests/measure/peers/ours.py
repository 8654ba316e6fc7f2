"""Measure transformers as it is, and attached: plain, compiled, with Liger's kernels.

    PYTHONPATH=src:tests python -m measure.peers.ours ROWS CASE,CASE PART,PART

Parts: `plain` (sdpa, flash path), `layers` (plain, each text layer under torch.compile), `attached` (without a
ladder, and with one), `liger` (attached, and plain under its flash path, with Liger's kernels as
`TrainingArguments(use_liger_kernel=True)` applies them; one case a process, since Liger patches modules), `graph` (attached, one graph for all batches of the ladder), `warm` (only compiles that graph, into
inductor's cache, so that cases compile side by side before they are measured).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config

from measure.peers import cell
from measure.peers.cell import DEVICE, DTYPE, ON_GPU, Case, attempt, on_device, stepper
from measure.peers.kernels import provide_flash_attn
from measure.peers.rows import config_file, load_case

# Cases that are drawn as a timeline too, and how many of their steps.
DRAWN, DRAWN_STEPS = ("2b-mixed8", "tiny"), 3
_WARM_SHARE = 0.3


def build(case: Case, attention: str) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = dict(case["config"])
    live = AutoConfig.for_model(config.pop("model_type"), **config)
    with DEVICE:
        model = AutoModelForImageTextToText.from_config(
            live, attn_implementation=attention, dtype=DTYPE
        )
    cell.draw_weights(model.named_parameters())
    return model.train()


def padded(case: Case) -> list[Any]:
    from mrope.collate.padding import PaddingCollator

    return [on_device(PaddingCollator()(rows)) for rows in case["batches"]]


def collated(case: Case, fixed: bool) -> list[Any]:
    """Return the batches of the stage, with a ladder of shapes or without."""
    from mrope import MRopeCollator
    from mrope.training.config import build_collator, load_config

    words = ["rope.enabled=true", "rope.vision=true", "dataloader.num_workers=0"]
    words += ["model.attach=true", f"model.dtype={str(DTYPE).removeprefix('torch.')}"]
    ladder: Any = build_collator(load_config(config_file(case["file"]), words))
    collate = ladder if fixed else MRopeCollator(None, ladder.spec, ladder.vision)
    return [on_device(dict(collate(rows))) for rows in case["batches"]]


def plain(case: Case) -> None:
    batches = padded(case)
    for attention in ("sdpa", "flash_attention_2"):

        def part(attention: str = attention) -> None:
            model = build(case, attention)
            timed(case, f"transformers, {attention}", model, model, batches)

        attempt(case, f"transformers, {attention}", part)


def layers(case: Case) -> None:
    model, batches = build(case, "sdpa"), padded(case)
    for layer in model.model.language_model.layers:
        layer.compile(dynamic=False)
    cell.measure(case, "transformers, sdpa, text layers compiled", stepper(model, model, batches))


def attached(case: Case) -> None:
    from mrope.hf import attach

    model = attach(build(case, "sdpa"))
    timed(case, "attached", model, model, collated(case, fixed=False))
    name = "attached, fixed shapes"
    cell.measure(case, name, stepper(model, model, collated(case, fixed=True)))


def liger(case: Case) -> None:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    from mrope.hf import attach

    # Attached first: where the release is proved on a small model, on the CPU, Liger's rope may not be in it.
    model = attach(build(case, "sdpa"))
    _apply_liger_kernel_to_instance(model=model)
    cell.measure(case, "attached, Liger", stepper(model, model, collated(case, fixed=False)))
    model = build(case, "flash_attention_2")
    _apply_liger_kernel_to_instance(model=model)
    name = "transformers, flash_attention_2, Liger"
    cell.measure(case, name, stepper(model, model, padded(case)))


def graph(case: Case) -> None:
    from torch._dynamo.utils import counters

    from mrope.hf import attach

    model, batches = attach(build(case, "sdpa")), collated(case, fixed=True)
    before = counters["stats"]["unique_graphs"]
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    timed(case, "attached, one graph", compiled, model, batches)
    graphs = counters["stats"]["unique_graphs"] - before
    cell.write({"case": case["name"], "note": f"graphs for {len(batches)} batches: {graphs}"})
    torch._dynamo.reset()


def warm(case: Case) -> None:
    from mrope.hf import attach

    if ON_GPU:
        torch.cuda.set_per_process_memory_fraction(_WARM_SHARE)  # others compile on this GPU
    model, batches = attach(build(case, "sdpa")), collated(case, fixed=True)
    # Raised by running the graph beside other processes; by then it is in the cache.
    with suppress(torch.OutOfMemoryError):
        run: Any = torch.compile(model, fullgraph=True, dynamic=False)
        run(**batches[0])


def timed(case: Case, peer: str, run: Any, model: Any, batches: list[Any]) -> None:
    """Measure a cell; of a drawn case also record when host and GPU work in some steps."""
    found = cell.measure(case, peer, stepper(run, model, batches))
    if case["name"] not in DRAWN:
        return
    from measure.timeline import Mark, record_timeline

    def one_step(batch: Any, mark: Mark) -> None:
        with mark("forward"):
            loss = run(**batch).loss
        with mark("backward"):
            loss.backward()
        model.zero_grad(set_to_none=True)

    lanes = {
        lane: [(round(start, 3), round(end, 3), what) for start, end, what in intervals]
        for lane, intervals in record_timeline(one_step, batches[:DRAWN_STEPS]).items()
    }
    shown = {"step_ms": found["ms"], "gpu_idle_share": found["gpu_idle_share"], **lanes}
    cell.write({"case": case["name"], "peer": peer, "timeline": shown})


PARTS: dict[str, Callable[[Case], None]] = {
    part.__name__: part for part in (plain, layers, attached, liger, graph, warm)
}


def main(folder: Path, files: list[str], parts: list[str]) -> None:
    provide_flash_attn()
    # The backward is compiled with the forward, without a step that needs its memory.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    cell.write_versions(",".join(parts), "transformers", "liger-kernel", "triton")
    for file in files:
        case = load_case(folder, file) | {"file": file}
        for part in parts:
            attempt(case, part, partial(PARTS[part], case))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3].split(","))
