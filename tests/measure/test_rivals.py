"""Check that the rivals compute equal results, and that packing is measured on what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from measure.__main__ import app
from measure.packing import fitted_exponent, make_examples, make_pixel_examples
from measure.rivals import RowsOnHost, per_span_rope_index, rope_index_on_device
from mrope import MRopeCollator, MRopeSpec, Shapes, VisionSpec, rope_index
from mrope.bench.positions import Case, make_batch
from mrope.guard import SyncGuard
from mrope.spec.spec import example_config

SPEC = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
CASES = [Case("both", 2, 512, 3, 2, 4), Case("images", 3, 300, 5), Case("clips", 1, 700, 0, 2, 9)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_rival_equals_the_kernel(case: Case) -> None:
    batch = make_batch(case, SPEC)
    expected = rope_index(SPEC, **batch)
    tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
    frames = int(batch["video_grid_thw"][:, 0].sum())
    rivals = [
        per_span_rope_index(SPEC, **batch),
        RowsOnHost(SPEC)(**tensors),
        rope_index_on_device(SPEC, **tensors, frames=frames),
    ]
    for outputs in rivals:
        for theirs, ours in zip(outputs, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(theirs), ours)


def test_positions_on_the_device_need_no_sync() -> None:
    batch = make_batch(CASES[0], SPEC)
    tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
    with SyncGuard() as guard:
        rope_index_on_device(SPEC, **tensors, frames=16)
    assert guard.count == 0, guard.report()


def test_the_fitted_exponent_is_that_of_a_power_law() -> None:
    sizes = [2048, 4096, 16384, 131072]
    assert fitted_exponent(sizes, [3e-9 * size for size in sizes]) == pytest.approx(1.0)
    assert fitted_exponent(sizes, [2e-9 * size**1.5 for size in sizes]) == pytest.approx(1.5)


@pytest.mark.parametrize("tokens", [2048, 16384])
def test_packing_is_measured_on_the_stated_number_of_tokens(tokens: int) -> None:
    examples = make_examples(tokens, SPEC)
    lengths = [len(example["input_ids"]) for example in examples]
    assert sum(lengths) == tokens and len(set(lengths)) > 1
    batch = MRopeCollator(None, SPEC, packing="flatten")(examples)
    assert batch["input_ids"].shape == (1, tokens)


def test_fixed_shapes_are_measured_on_images_of_many_sizes() -> None:
    config = example_config("qwen3_vl")
    config["vision_config"] |= {"patch_size": 2, "num_position_embeddings": 16}
    vision = VisionSpec.from_config(config)
    examples = make_pixel_examples(4096, SPEC, vision)
    assert sum(len(example["input_ids"]) for example in examples) == 4096
    grids = torch.cat([example["image_grid_thw"] for example in examples])
    assert len({*map(tuple, grids.tolist())}) > 10
    plain, fixed = (
        MRopeCollator(None, SPEC, vision, packing="flatten", shapes=shapes)(examples)
        for shapes in (None, Shapes((4096,), (12288,), 784))
    )
    patches = len(plain["pixel_values"])
    assert torch.equal(fixed["pixel_values"][:patches], plain["pixel_values"])
    assert torch.equal(fixed["input_ids"], plain["input_ids"])


def test_the_bench_of_vision_tensors_writes_what_it_measured(tmp_path: Path) -> None:
    pytest.importorskip("transformers.vision_utils")
    pytest.importorskip("matplotlib")
    file, plot = tmp_path / "vision.json", tmp_path / "vision.png"
    words = ["vision", "--quick", "--repeats", "1", "--json", str(file), "--plot", str(plot)]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    report = json.loads(file.read_text())
    (case,) = report["cases"]
    assert [entry["name"] for entry in case["tensors"]] == [
        "rotary ids",
        "window index",
        "interpolation",
    ]
    for entry in case["tensors"]:
        assert entry["warm_speedup"] == entry["seconds"]["transformers"] / entry["seconds"]["warm"]
    assert {"transformers", "numpy", "torch", "date", "processor"} <= set(report["conditions"])
    assert plot.stat().st_size > 0
