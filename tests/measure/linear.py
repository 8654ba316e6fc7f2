"""Measure Qwen3.5 on a GPU with flash-linear-attention, or compare its gradients there.

    PYTHONPATH=src:tests python -m measure.linear step configs/bench/qwen3_5-short.yaml --json FILE
    PYTHONPATH=src:tests python -m measure.linear step CONFIG model.attn_implementation=flash_attention_2
    PYTHONPATH=src:tests python -m measure.linear compile 3/14 configs/bench/qwen3_5-short.yaml --steps 2
    PYTHONPATH=src:tests python -m measure.linear check [tiny]

`step` is `mrope bench step`, whose words follow it; flash_attention_2 is torch's own copy of the kernel,
behind transformers' own path. flash-linear-attention refuses Triton 3.4 to 3.7 on
Hopper in the backward pass, for wrong gradients (its #640), and attached models then run in torch. Both
are lifted here, so `check` must
be read beside every figure: it compares losses and gradients of a flattened row with those of its examples
one by one, under the same kernels, and with the plain model in float32 on the CPU, by transformers'
reference; `tiny` runs on a CPU.

Each kernel is tuned at its first call, by Triton's own tuner with shorter timings (20 ms a configuration).
There are hundreds of configurations; `compile 3/14` is the same as `step`, with every 14th from the third
on, each run once: 14 such processes fill Triton's cache side by side before something is measured. Set
FLA_CACHE_RESULTS=0 for them, so that their choices are not kept.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.qwen3_5 import modeling_qwen3_5

from mrope import MRopeCollator, MRopeSpec, Shapes, VisionSpec
from mrope.cli.bench import bench_app
from mrope.collate.padding import PaddingCollator
from mrope.hf import attach, compile_layers, detach, fused
from mrope.training.step import to_device
from support.flash import flash_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLASH = "model.attn_implementation=flash_attention_2"
BENCHED_MS = {"warmup": 5, "rep": 20}
HEADS, WIDTH, HIDDEN, LAYERS = 2, 32, 128, 4
Batch = dict[str, Any]


def prepare_kernels(part: tuple[int, int] | None) -> str:
    """Lift the refusal and shorten tuning, or take a part of it; return the versions."""
    if importlib.util.find_spec("fla") is None:
        return "without flash-linear-attention"
    fla, triton = importlib.import_module("fla"), importlib.import_module("triton")
    importlib.import_module("fla.ops.common.chunk_o").TRITON_ABOVE_3_4_0 = False  # type: ignore[attr-defined]
    fused._is_refused = lambda: False
    testing: Any = importlib.import_module("triton.testing")
    testing.do_bench = partial(testing.do_bench, **BENCHED_MS)
    if part is not None:
        take_part(*part)
    return f"flash-linear-attention {fla.__version__}, triton {triton.__version__}"


def take_part(first: int, parts: int) -> None:
    """Let Triton's tuner run each configuration of this part once, and trust none of the times."""
    tuner: Any = importlib.import_module("triton.runtime.autotuner").Autotuner
    own = tuner._bench

    def bench(self: Any, *args: object, config: Any, **meta: object) -> list[float]:
        if self.configs.index(config) % parts == first:
            return list(own(self, *args, config=config, **meta))
        return [1e6 * config.num_stages] * 3  # the least shared memory, if no other runs

    tuner._bench = bench
    importlib.import_module("triton.testing").do_bench = run_once  # type: ignore[attr-defined]


def run_once(call: Callable[[], object], **_: object) -> list[float]:
    """Call a kernel, in place of Triton's benchmark of it."""
    call()
    return [0.0] * 3


def small_config() -> Any:
    text: dict[str, Any] = {
        "model_type": "qwen3_5_text",
        "vocab_size": 512,
        "hidden_size": HIDDEN,
        "intermediate_size": 3 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "full_attention_interval": LAYERS,
        "linear_num_key_heads": HEADS,
        "linear_num_value_heads": HEADS,
        "linear_key_head_dim": WIDTH,
        "linear_value_head_dim": WIDTH,
        "pad_token_id": 0,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.5,
            "mrope_section": [8, 4, 4],
            "mrope_interleaved": True,
        },
    }
    vision: dict[str, Any] = {
        "model_type": "qwen3_5_vision",
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 2304,
    }
    tokens = {"image_token_id": 5, "video_token_id": 6}
    tokens |= {"vision_start_token_id": 3, "vision_end_token_id": 4}
    return AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision, **tokens)


def build(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    auto: Any = AutoModelForImageTextToText
    with device:
        return auto.from_config(config, attn_implementation="sdpa", dtype=dtype).train()


def make_examples(config: Any) -> list[Batch]:
    """Examples of one chunk of the kernels and of several, with an image each."""
    rng = np.random.default_rng(0)
    return [_example(config, rng) for _ in range(8)]


def _example(config: Any, rng: Any) -> Batch:
    height, width = (2 * int(side) for side in rng.integers(1, 3, 2))
    text = rng.integers(8, config.text_config.vocab_size, int(rng.integers(20, 300))).tolist()
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
) -> list[Batch]:
    if options.pop("plain", False):
        collator: Any = PaddingCollator()
    else:
        spec, vision = MRopeSpec.from_config(config), VisionSpec.from_config(config)
        collator = MRopeCollator(None, spec, vision, **options)
    made = [dict(collator([dict(one) for one in examples])) for examples in batches]
    for batch in made:
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
    return [to_device(batch, device) for batch in made]


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


def check(tiny: bool) -> None:
    """Compare a flattened row with its examples alone, by the same kernels, and with the CPU."""
    dtype = torch.float32 if tiny else torch.bfloat16
    config = small_config()
    examples = make_examples(config)
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


def main(what: str, *words: str) -> None:
    part = None
    if what == "compile":
        first, parts = map(int, words[0].split("/"))
        part, words = (first - 1, parts), words[1:]
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    day = time.strftime("%Y-%m-%d", time.gmtime())
    print(f"{where}, {versions}, {prepare_kernels(part)}, {day}", flush=True)
    if what == "check":
        check("tiny" in words)
    else:
        with flash_attention() if FLASH in words else nullcontext():
            bench_app(["step", *words])


if __name__ == "__main__":
    main(*sys.argv[1:])
