"""Check that the benchmarks' rivals compute equal results, and that their helpers are correct."""

from __future__ import annotations

from functools import partial
from itertools import groupby

import numpy as np
import pytest
import torch

from mrope import MRopeCollator, MRopeSpec, Shapes, VisionSpec, rope_index
from mrope.bench.harness import interleaved_medians, one_thread
from mrope.bench.packing import fitted_exponent, make_examples, make_pixel_examples
from mrope.bench.positions import Case, make_batch
from mrope.bench.rivals import RowsOnHost, per_span_rope_index, rope_index_on_device
from mrope.bench.step import Measured, step_table
from mrope.bench.trace import covered_length
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


def test_busy_time_counts_overlaps_once() -> None:
    assert covered_length([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


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


def test_medians_are_per_call_and_every_function_runs_in_each_round() -> None:
    calls: list[str] = []
    contenders = {name: partial(calls.append, name) for name in ("one", "other")}
    medians = interleaved_medians(contenders, repeats=3)
    assert list(medians) == ["one", "other"] and all(value > 0 for value in medians.values())
    order = [name for name, _ in groupby(calls)]
    # The first call of each sizes its turns; then three interleaved rounds.
    assert order == ["one", "other"] * 4


def test_one_thread_is_restored() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_the_table_of_steps_reads_what_is_measured() -> None:
    measured = Measured(host=[1, 2, 3], step=[4, 5, 6], stage=[0, 1, 2], syncs=7)
    measured.device = {"gpu_idle_share": 0.5, "gpu_busy_ms": 9.0}
    table = step_table("name", {"plain": measured.summary()})
    cells = [next(iter(column.cells)) for column in table.columns]
    timings = ["2000.0 (1000.0 to 3000.0)", "5000.0", "1.000", "20.0 %", "50.0 %", "9.0"]
    assert cells == ["plain", "7", *timings]


def test_sites_of_a_report_carry_no_folder_of_the_machine() -> None:
    measured = Measured(host=[1, 2], step=[1, 2], stage=[1, 2])
    measured.sites = "/home/me/.venv/lib/site-packages/torch/x.py:3 f: tolist\n4 waits at 1 sites"
    assert measured.summary()["sites"] == [
        "site-packages/torch/x.py:3 f: tolist",
        "4 waits at 1 sites",
    ]
