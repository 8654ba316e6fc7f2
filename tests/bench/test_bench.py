"""The rivals that the benches measure compute the same numbers: a ratio to wrong numbers is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mrope import MRopeCollator, MRopeSpec, rope_index
from mrope.bench.known_fix import RowsOnHost
from mrope.bench.on_device import rope_index_on_device
from mrope.bench.packing import fitted_exponent, make_examples
from mrope.bench.per_span import per_span_rope_index
from mrope.bench.positions import Case, make_batch
from mrope.bench.step import _union
from mrope.guard.sync_guard import SyncGuard
from mrope.spec.spec import example_config

SPEC = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
CASES = [Case("both", 2, 512, 3, 2, 4), Case("images", 3, 300, 5), Case("clips", 1, 700, 0, 2, 9)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_rival_computes_what_the_kernel_does(case: Case) -> None:
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


def test_the_alternative_on_the_device_does_not_wait() -> None:
    batch = make_batch(CASES[0], SPEC)
    tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
    with SyncGuard() as guard:
        rope_index_on_device(SPEC, **tensors, frames=16)
    assert guard.count == 0, guard.report()


def test_busy_time_counts_overlaps_once() -> None:
    assert _union([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


def test_the_fitted_exponent_is_that_of_a_power_law() -> None:
    sizes = [2048, 4096, 16384, 131072]
    assert fitted_exponent(sizes, [3e-9 * size for size in sizes]) == pytest.approx(1.0)
    assert fitted_exponent(sizes, [2e-9 * size**1.5 for size in sizes]) == pytest.approx(1.5)


@pytest.mark.parametrize("tokens", [2048, 16384])
def test_packing_is_measured_on_as_many_tokens_as_it_says(tokens: int) -> None:
    examples = make_examples(tokens, SPEC)
    lengths = [len(example["input_ids"]) for example in examples]
    assert sum(lengths) == tokens and len(set(lengths)) > 1
    batch = MRopeCollator(None, SPEC, packing="flatten")(examples)
    assert batch["input_ids"].shape == (1, tokens)
