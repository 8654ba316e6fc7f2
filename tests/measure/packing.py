"""Time the collator on padded and flattened batches, and with fixed shapes: `python -m measure packing`.

The stage is what `MRopeCollator` adds after the inner collate function: position ids, vision
tensors, document borders and, for flattened batches, the token columns joined into one row. Padded
batches contain the padding that examples of mixed lengths need; times are per valid token.

Fixed shapes are compared on whole calls, from examples to batch, as a worker makes them: pixels
included, of images of many sizes. The rival is the same collator without `shapes`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mrope.bench.harness import (
    conditions,
    figure_file,
    interleaved_medians,
    make_console,
    make_table,
    one_line,
    one_thread,
    write_json,
)
from mrope.collate.collator import MRopeCollator
from mrope.collate.ladder import Shapes
from mrope.collate.padding import PaddingCollator
from mrope.positions.sample_rows import Medium, Part, make_row
from mrope.spec.spec import MRopeSpec, example_config
from mrope.towers import VisionSpec

TOKENS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
_MEAN_LENGTH = 1024
_TEXT_ID = 7
_IMAGE_SIDE = 16  # merged patches: 256 tokens
# Pixels of larger batches would take gigabytes; a worker's batch is rarely that large.
_MOST_WITH_PIXELS = 16384
# Sides of images of many sizes, in merged patches: 96 to 448 pixels.
_SIDES = (3, 14)
# A rung is so much larger than the batch: half of the padding that `Shapes.fit` aims below.
_ABOVE = 1.04


def bench_packing(
    repeats: int, quick: bool, json_file: Path | None, plot_file: Path | None
) -> None:
    """Measure every size, print a table, and write JSON and a picture if files are given.

    Args:
        repeats: interleaved rounds, at least 1; published figures take 15 or more.
        quick: skip the sizes above 16,384 tokens.
    """
    sizes = TOKENS[:4] if quick else TOKENS
    with one_thread():
        cases = [_measure(tokens, repeats) for tokens in sizes]
        with_pixels = [tokens for tokens in sizes if tokens <= _MOST_WITH_PIXELS]
        fixed = [_measure_fixed(tokens, repeats) for tokens in with_pixels]
    report = {
        "conditions": conditions(),
        "repeats": repeats,
        "cases": cases,
        "fixed_shapes": fixed,
        "exponents": {
            name: fitted_exponent(
                [case["tokens"] for case in cases], [case["seconds"][name] for case in cases]
            )
            for name in cases[0]["seconds"]
        },
    }
    _print(report)
    write_json(report, json_file)
    if plot_file is not None:
        _plot(report, plot_file)


def fitted_exponent(sizes: list[int], seconds: list[float]) -> float:
    """Fit seconds = c * size**k by least squares of the logarithms, and return k."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def make_examples(tokens: int, spec: MRopeSpec) -> list[dict[str, Any]]:
    """Return examples of 512 to 1,536 tokens, about half of them vision, `tokens` in total."""
    rng = np.random.default_rng(tokens)
    count = tokens // _MEAN_LENGTH
    lengths = rng.integers(_MEAN_LENGTH // 2, _MEAN_LENGTH * 3 // 2, count)
    lengths += (tokens - lengths.sum()) // count
    # The last example takes the rounding, so that every size is met exactly.
    lengths[-1] += tokens - lengths.sum()
    return [_example(int(length), spec) for length in lengths]


def _example(length: int, spec: MRopeSpec) -> dict[str, Any]:
    images = max(1, length // 2 // _IMAGE_SIDE**2)
    side = _IMAGE_SIDE * spec.spatial_merge_size
    gap = [_TEXT_ID] * (length // images - _IMAGE_SIDE**2 - 1)
    parts: list[Part] = [Medium("image", (1, side, side)), gap] * images
    return _tensors(make_row(spec, [*parts, [_TEXT_ID] * (length % images)]))


def _tensors(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in row.items()}


def make_pixel_examples(tokens: int, spec: MRopeSpec, vision: VisionSpec) -> list[dict[str, Any]]:
    """Return examples as `make_examples`, with images of many sizes and their pixels."""
    assert vision.patch_shape is not None
    rng = np.random.default_rng(tokens)
    examples = []
    for start in range(0, tokens, _MEAN_LENGTH):
        length = min(_MEAN_LENGTH, tokens - start)
        parts: list[Part] = [[_TEXT_ID]]
        taken = 1
        # Half of a row is vision, as in the other cases.
        while taken < length // 2:
            height, width = rng.integers(_SIDES[0], _SIDES[1] + 1, 2).tolist()
            merge = spec.spatial_merge_size
            parts.append(Medium("image", (1, merge * height, merge * width)))
            taken += 1 + height * width
        example = _tensors(make_row(spec, [*parts, [_TEXT_ID] * (length - taken)]))
        patches = int(example["image_grid_thw"].prod(dim=1).sum())
        example["pixel_values"] = torch.randn(patches, *vision.patch_shape)
        examples.append(example)
    return examples


def _measure_fixed(tokens: int, repeats: int) -> dict[str, Any]:
    spec, vision = _specs()
    examples = make_pixel_examples(tokens, spec, vision)
    patches = sum(len(example["pixel_values"]) for example in examples)
    rungs = [-(-int(_ABOVE * size) // 64) * 64 for size in (tokens, patches)]
    longest = (spec.spatial_merge_size * _SIDES[1]) ** 2
    shapes = Shapes(rungs[:1], rungs[1:], longest, patches_per_segment=64)
    contenders: dict[str, Callable[[], Any]] = {
        "flattened": _stage(MRopeCollator(None, spec, vision, packing="flatten"), examples),
        "fixed shapes": _stage(
            MRopeCollator(None, spec, vision, packing="flatten", shapes=shapes), examples
        ),
    }
    assert len(contenders["fixed shapes"]()["pixel_values"]) == rungs[1]
    return {
        "tokens": tokens,
        "images": sum(len(example["image_grid_thw"]) for example in examples),
        "patches": patches,
        "rungs": rungs,
        "seconds": interleaved_medians(contenders, repeats),
    }


def _specs() -> tuple[MRopeSpec, VisionSpec]:
    config = example_config("qwen3_vl")
    config["vision_config"] |= {"patch_size": 16, "num_position_embeddings": 2304}
    return MRopeSpec.from_config(config, "transformers-5.23"), VisionSpec.from_config(config)


def _measure(tokens: int, repeats: int) -> dict[str, Any]:
    spec, vision = _specs()
    examples = make_examples(tokens, spec)
    # The inner collate function only copies a dict, so that its own time is not measured.
    padded = PaddingCollator()(examples)
    contenders: dict[str, Callable[[], Any]] = {
        "padded": _stage(MRopeCollator(lambda _: dict(padded), spec, vision), examples),
        "flattened": _stage(
            MRopeCollator(lambda _: dict(padded), spec, vision, packing="flatten"), examples
        ),
    }
    assert contenders["flattened"]()["input_ids"].shape == (1, tokens)
    return {
        "tokens": tokens,
        "examples": len(examples),
        "padding_share": 1 - tokens / padded["input_ids"].numel(),
        "seconds": interleaved_medians(contenders, repeats),
    }


def _stage(collate: MRopeCollator, examples: list[dict[str, Any]]) -> Callable[[], Any]:
    return lambda: collate(examples)


def _print(report: dict[str, Any]) -> None:
    numbers = ("tokens", "examples", "padding", "padded", "flattened", "flattened / padded")
    table = make_table("collator's stage: median time per valid token, one thread", (), numbers)
    for case in report["cases"]:
        padded, flattened = case["seconds"]["padded"], case["seconds"]["flattened"]
        table.add_row(
            f"{case['tokens']:,}",
            str(case["examples"]),
            f"{case['padding_share']:.0%}",
            *(f"{one / case['tokens'] * 1e9:.0f} ns" for one in (padded, flattened)),
            f"{flattened / padded:.2f}",
        )
    console = make_console()
    console.print(table)
    console.print(_fixed_table(report))
    exponents = ", ".join(f"{name} {value:.2f}" for name, value in report["exponents"].items())
    console.print(f"time = c * tokens**k with k: {exponents} (at most 1.1)")
    console.print(one_line(report["conditions"]))


def _fixed_table(report: dict[str, Any]) -> Any:
    numbers = ("tokens", "images", "patches", "flattened", "fixed shapes", "ratio")
    title = "a worker's batch with pixels: median time, one thread; ratio at most 1.3"
    table = make_table(title, (), numbers)
    for case in report["fixed_shapes"]:
        seconds = case["seconds"]
        table.add_row(
            *(f"{case[name]:,}" for name in ("tokens", "images", "patches")),
            *(f"{seconds[name] * 1e3:.2f} ms" for name in ("flattened", "fixed shapes")),
            f"{seconds['fixed shapes'] / seconds['flattened']:.2f}",
        )
    return table


def _plot(report: dict[str, Any], file: Path) -> None:
    sizes = [case["tokens"] for case in report["cases"]]
    with figure_file(file, (7, 4)) as (_, axes):
        for name, exponent in report["exponents"].items():
            seconds = [case["seconds"][name] * 1e6 for case in report["cases"]]
            axes.loglog(sizes, seconds, marker="o", label=f"{name}, k = {exponent:.2f}")
        axes.set(xlabel="valid tokens of the batch", ylabel="microseconds")
        axes.legend()
