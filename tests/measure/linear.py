"""Measure Qwen3.5 on a GPU: plain, attached, flattened in one call a layer, compiled layer by layer.

    PYTHONPATH=src:tests python -m measure.linear check,short,long,moe [tiny]
    PYTHONPATH=src:tests python -m measure.linear short plain
    PYTHONPATH=src:tests python -m measure.linear short flat untuned

`check` compares losses and gradients of a flattened row with those of its examples one by one, under
the same kernels, and with the plain model in float32 on the CPU, by transformers' reference. Each case:
milliseconds of a step, forward and backward, by CUDA events (median of 8 after 3); GPU idle and the
share of matrix products in kernel time by a trace of 2 further steps; model FLOPs (of matrix products
and attention, counted by torch) over 989 TFLOP/s; losses of two batches. With `plain` nothing
is compiled: for runs without flash-linear-attention. `tiny` runs on a CPU. `flat`
measures flattened rows alone. flash-linear-attention tries dozens of configurations of each kernel,
for minutes; with `untuned` it takes the first of each, so that its kernels are no faster than otherwise.

flash-linear-attention refuses Triton 3.4 to 3.7 on Hopper in the backward pass, for wrong gradients (its
#640). The refusal is lifted here, so `check` must be read beside every figure.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import transformers
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.qwen3_5 import modeling_qwen3_5

from mrope import MRopeCollator, MRopeSpec, Shapes, VisionSpec
from mrope.bench.trace import covered_length, trace_steps
from mrope.collate.padding import PaddingCollator
from mrope.hf import attach, compile_layers, detach
from mrope.training.step import to_device
from support.no_syncs import no_syncs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PEAK = 989e12  # of an H200, bfloat16, dense
BATCHES = 4
# Steps of many seconds, without kernels, are measured less often.
STEPS, WARM_UP = (4, 1) if "plain" in sys.argv else (8, 3)
PRODUCTS = ("gemm", "nvjet", "cutlass", "cublas", "xmma", "splitk", "mm_kernel")
# Examples of a batch, and their tokens of text from and to; sides of images in merged tokens.
CASES = {"short": (16, 64, 700), "long": (4, 1400, 2400), "moe": (16, 64, 700)}
TINY_CASES = {"short": (4, 4, 20), "long": (2, 70, 90), "moe": (4, 4, 20)}
Batch = dict[str, Any]


def config_of(moe: bool, tiny: bool, layers: int) -> Any:
    hidden, heads = (128, 2) if tiny else (2048, 16)
    width = 32 if tiny else 128
    text: dict[str, Any] = {
        "vocab_size": 512 if tiny else 151936,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "head_dim": 64 if tiny else 128,
        "full_attention_interval": 4,
        "linear_num_key_heads": heads,
        "linear_num_value_heads": heads,
        "linear_key_head_dim": width,
        "linear_value_head_dim": width,
        "pad_token_id": 0,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.5,
            "mrope_section": [8, 4, 4] if tiny else [12, 10, 10],
            "mrope_interleaved": True,
        },
    }
    if moe:
        text |= {
            "num_experts": 4 if tiny else 32,
            "num_experts_per_tok": 2 if tiny else 4,
            "moe_intermediate_size": 64 if tiny else 512,
            "shared_expert_intermediate_size": 64 if tiny else 512,
        }
    kind = "qwen3_5_moe" if moe else "qwen3_5"
    vision: dict[str, Any] = {
        "depth": 2 if tiny else 24,
        "hidden_size": 64 if tiny else 1024,
        "intermediate_size": 128 if tiny else 4096,
        "num_heads": 4 if tiny else 16,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": hidden,
        "num_position_embeddings": 2304,
    }
    tokens = {"image_token_id": 5, "video_token_id": 6}
    tokens |= {"vision_start_token_id": 3, "vision_end_token_id": 4}
    vision["model_type"], text["model_type"] = f"{kind}_vision", f"{kind}_text"
    return AutoConfig.for_model(kind, text_config=text, vision_config=vision, **tokens)


def build(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    auto: Any = AutoModelForImageTextToText
    with device:
        return auto.from_config(config, attn_implementation="sdpa", dtype=dtype).train()


def make_examples(config: Any, case: tuple[int, int, int], tiny: bool) -> list[list[Batch]]:
    rng = np.random.default_rng(0)
    number, least, most = case
    return [
        [_example(config, rng, least, most, tiny) for _ in range(number)] for _ in range(BATCHES)
    ]


def _example(config: Any, rng: Any, least: int, most: int, tiny: bool) -> Batch:
    height, width = (
        2 * int(side) for side in (rng.integers(1, 3, 2) if tiny else rng.integers(4, 12, 2))
    )
    text = rng.integers(8, config.text_config.vocab_size, int(rng.integers(least, most))).tolist()
    ids = torch.tensor([*[7] * 4, 3, *[5] * (height * width // 4), 4, *text])
    pixels = torch.from_numpy(rng.standard_normal((height * width, 1536), np.float32))
    return {
        "input_ids": ids,
        "labels": torch.where(ids > 6, ids, -100),
        "mm_token_type_ids": (ids == 5).long(),
        "image_grid_thw": torch.tensor([[1, height, width]]),
        "pixel_values": pixels,
    }


def collate(
    config: Any, batches: list[list[Batch]], dtype: Any, device: Any, **options: Any
) -> Any:
    if options.pop("plain", False):
        collator: Any = PaddingCollator()
    else:
        spec, vision = MRopeSpec.from_config(config), VisionSpec.from_config(config)
        collator = MRopeCollator(None, spec, vision, **options)
    made = [dict(collator(copy.deepcopy(examples))) for examples in batches]
    for batch in made:
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
    return [to_device(batch, device) for batch in made]


def step(model: Any, batch: Batch) -> torch.Tensor:
    loss: torch.Tensor = model(**batch).loss
    loss.backward()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        parameter.grad = None
    return loss


def time_steps(one_step: Callable[[int], Any]) -> float:
    for number in range(WARM_UP):
        one_step(number)
    if DEVICE.type != "cuda":
        return float("nan")
    torch.cuda.synchronize()
    marks: list[Any] = []
    for number in range(STEPS + 1):
        kind: Any = torch.cuda.Event
        marks.append(kind(enable_timing=True))
        marks[-1].record()
        if number < STEPS:
            one_step(number)
    torch.cuda.synchronize()
    times: list[float] = sorted(one.elapsed_time(other) for one, other in pairwise(marks))
    return times[STEPS // 2]


def describe_trace(one_step: Callable[[int], Any]) -> str:
    if DEVICE.type != "cuda":
        return ""
    events = trace_steps(one_step, range(2))
    wall = max(one.end for one in events) - min(one.start for one in events)
    busy = covered_length([(one.start, one.end) for one in events])
    products = [
        (one.start, one.end) for one in events if any(name in one.name.lower() for name in PRODUCTS)
    ]
    return (
        f"idle {100 * (1 - busy / wall):5.1f} %  busy {busy / 2e6:6.1f} ms  "
        f"{len(events) / 2:6.0f} kernels  products {100 * covered_length(products) / busy:4.1f} %"
    )


def measure(name: str, model: Any, batches: list[Batch], flops: float, synced: bool) -> float:
    start = time.perf_counter()
    try:
        losses = [step(model, batch).item() for batch in batches[:2]]
        first = time.perf_counter() - start
        milliseconds = time_steps(lambda number: step(model, batches[number % BATCHES]))
        trace = describe_trace(lambda number: step(model, batches[number % BATCHES]))
        if not synced:
            with no_syncs(DEVICE):
                step(model, batches[1])
    except Exception as error:  # noqa: BLE001 - the other variants are measured all the same
        print(f"{name:40s} FAILED {type(error).__name__}: {str(error)[:600]}", flush=True)
        return float("nan")
    used = 100 * flops / PEAK / (milliseconds / 1e3)
    print(
        f"{name:40s} {milliseconds:7.1f} ms  {trace}  MFU {used:4.1f} %  first two {first:5.1f} s  "
        f"syncs {'not tried' if synced else 0}  losses {losses}",
        flush=True,
    )
    return milliseconds


def count_flops(model: Any, batch: Batch) -> float:
    with FlopCounterMode(display=False) as counter:
        step(model, batch)
    return float(counter.get_total_flops())


def measure_case(name: str, options: list[str]) -> None:
    tiny = "tiny" in options
    dtype = torch.float32 if tiny else torch.bfloat16
    config = config_of(name == "moe", tiny, layers=4 if tiny else 24)
    batches = make_examples(config, (TINY_CASES if tiny else CASES)[name], tiny)
    tokens = [sum(len(one["input_ids"]) for one in batch) for batch in batches]
    patches = max(sum(len(one["pixel_values"]) for one in batch) for batch in batches)
    fixed = Shapes(
        tokens=(-(-(max(tokens) + 1) // 64) * 64,),
        patches=(-(-patches // 256) * 256,),
        longest=484,
        patches_per_segment=64,
        tokens_per_example=8 if tiny else 256,
    )
    print(f"\n{name}: tokens {tokens}, {fixed}", flush=True)
    model = build(config, DEVICE, dtype)
    kinds: dict[str, Batch] = {
        "plain, padded": {"plain": True},
        "attached, padded": {},
        "attached, flattened": {"packing": "flatten"},
        "attached, flattened, fixed shapes": {"packing": "flatten", "shapes": fixed},
    }
    made = {key: collate(config, batches, dtype, DEVICE, **value) for key, value in kinds.items()}
    plain = float("nan")
    if "flat" not in options:
        plain = measure("plain, padded", model, made["plain, padded"], 0, synced=True)
    attach(model)
    flops = count_flops(model, made["attached, flattened"][0])
    floor = f"{1e3 * flops / PEAK:.1f} ms at {PEAK / 1e12:.0f} TFLOP/s"
    print(f"flattened: {flops / 1e12:.1f} TFLOP a step, at least {floor}", flush=True)
    for key in ["attached, flattened"] if "flat" in options else list(kinds)[1:]:
        found = measure(key, model, made[key], flops, synced=False)
        print(f"    {found / plain:.3f} of plain, padded", flush=True)
    if "plain" not in options:
        before = counters["stats"]["unique_graphs"]
        compile_layers(model)
        key = "attached, flattened, fixed shapes"
        found = measure("layers compiled, flattened", model, made[key], flops, synced=False)
        graphs = counters["stats"]["unique_graphs"] - before
        print(f"    {found / plain:.3f} of plain, padded; {graphs} graphs", flush=True)
    del model, made
    torch._dynamo.reset()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def gradients_of(model: Any, batches: list[Batch]) -> tuple[float, torch.Tensor]:
    """Return the sum of the batches' losses, each times its labels, and the gradients, flat."""
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        labels = batch["labels"]
        loss = model(**batch).loss * int((labels[..., 1:] != -100).sum())
        loss.backward()
        total += loss.item()
    flat = [one.grad.float().ravel().cpu() for one in model.parameters() if one.grad is not None]
    return total, torch.cat(flat)


@contextmanager
def by_reference() -> Iterator[None]:
    """Let Qwen3.5 compute by transformers' reference though kernels are installed."""
    name = "torch_chunk_gated_delta_rule"
    own = getattr(modeling_qwen3_5, name)
    setattr(modeling_qwen3_5, name, inspect.unwrap(own))
    try:
        yield
    finally:
        setattr(modeling_qwen3_5, name, own)


def check(options: list[str]) -> None:
    """Compare a flattened row with its examples alone, by the same kernels, and with the CPU."""
    tiny = "tiny" in options
    dtype = torch.float32 if tiny else torch.bfloat16
    config = config_of(False, True, layers=4)
    # Heads of 64, which the kernels take; more than one chunk in some of the examples.
    examples = make_examples(config, (8, 20, 300), tiny=True)[0]
    alone = [[one] for one in examples]
    cpu = torch.device("cpu")
    reference = build(config, cpu, torch.float32)
    with by_reference():
        want = gradients_of(reference, collate(config, alone, torch.float32, cpu, plain=True))
    model = build(config, cpu, torch.float32).to(DEVICE, dtype)
    found = {}
    plain = collate(config, alone, dtype, DEVICE, plain=True)
    found["plain, one by one"] = gradients_of(model, plain)
    attach(model)
    one_row = {"packing": "flatten"}
    fixed = Shapes(
        tokens=(2048,), patches=(512,), longest=64, patches_per_segment=8, tokens_per_example=64
    )
    found["attached, one by one"] = gradients_of(
        model, collate(config, alone, dtype, DEVICE, **one_row)
    )
    rows = collate(config, [examples], dtype, DEVICE, **one_row)
    found["attached, one call"] = gradients_of(model, rows)
    rows = collate(config, [examples], dtype, DEVICE, **one_row, shapes=fixed)
    found["attached, one call, fixed shapes"] = gradients_of(model, rows)
    compile_layers(model, **({"backend": "aot_eager"} if tiny else {}))
    try:
        found["layers compiled, fixed shapes"] = gradients_of(model, rows)
    except Exception as error:  # noqa: BLE001 - what was found before is printed
        print(f"compiled: FAILED {type(error).__name__}: {str(error)[:1500]}")
    own = found["attached, one by one"][1]
    print(f"float32 on a CPU, by transformers' reference: loss {want[0]:.4f}")
    for name, (loss, flat) in found.items():
        far, near = (((flat - one).norm() / one.norm()).item() for one in (want[1], own))
        print(
            f"{name:34s} loss {loss:.4f}  gradients, relative: {far:.2e} from the CPU's, "
            f"{near:.2e} from those of attached, one by one"
        )
    detach(model)
    torch._dynamo.reset()


def describe_kernels() -> str:
    if importlib.util.find_spec("fla") is None:
        return "without flash-linear-attention"
    fla, triton = importlib.import_module("fla"), importlib.import_module("triton")
    importlib.import_module("fla.ops.common.chunk_o").TRITON_ABOVE_3_4_0 = False  # type: ignore[attr-defined]
    if "untuned" in sys.argv:
        tuner: Any = importlib.import_module("triton.runtime.autotuner").Autotuner
        tuner.prune_configs = lambda self, *_, **__: self.configs[:1]
    return f"flash-linear-attention {fla.__version__}, triton {triton.__version__}"


if __name__ == "__main__":
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    day = time.strftime("%Y-%m-%d", time.gmtime())
    print(f"{where}, {versions}, {describe_kernels()}, {day}", flush=True)
    for one in sys.argv[1].split(","):
        begun = time.perf_counter()
        if one == "check":
            check(sys.argv[2:])
        else:
            measure_case(one, sys.argv[2:])
        print(f"({one}: {time.perf_counter() - begun:.0f} s)", flush=True)
