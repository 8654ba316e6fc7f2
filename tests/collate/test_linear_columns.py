"""What linear attention reads of a row: checked by hand, and against a slow twin."""

from __future__ import annotations

import numpy as np
import pytest

from mrope import MRopeCollator, Shapes
from mrope.collate.linear_columns import CHUNK, linear_columns
from support.models import tiny_examples, tiny_spec


def test_two_segments() -> None:
    found = linear_columns(np.array([3, 2]))
    assert found["linear_places"].tolist() == [[0, 1, 2, 0, 1]]
    assert found["linear_chunks"].tolist() == [[0, 0], [1, 0]]
    assert found["linear_slots"].tolist() == [0, 1, 2, 3, 4]
    assert found["linear_shape"] == [2, 3]


def test_fixed_shapes_put_padding_behind_each_segment() -> None:
    found = linear_columns(np.array([CHUNK, 2]), most=3)
    assert found["linear_slots"].tolist() == [*range(CHUNK), 2 * CHUNK, 2 * CHUNK + 1]
    assert found["linear_shape"] == [1, CHUNK * (1 + 3)]
    # Segment 1 ends before its chunk 2.
    assert found["linear_chunks"].tolist() == [[0, 0], [1, 0], [1, 2], [1, 2]]


@pytest.mark.parametrize("seed", range(20))
def test_as_a_loop_finds_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 3 * CHUNK, rng.integers(1, 9))
    most = len(lengths) + int(rng.integers(3))
    free, fixed = linear_columns(lengths), linear_columns(lengths, most)
    chunks = [[at, one] for at, n in enumerate(lengths) for one in range(-(-n // CHUNK))]
    assert free["linear_chunks"].tolist() == chunks
    assert fixed["linear_chunks"][: len(chunks)].tolist() == chunks
    for segment, chunk in fixed["linear_chunks"][len(chunks) :]:
        assert chunk * CHUNK >= lengths[segment]
    total = int(lengths.sum())
    assert len(fixed["linear_chunks"]) == total // CHUNK + most
    rows, width = fixed["linear_shape"]
    taken = np.full(rows * width + 1, -1)
    taken[fixed["linear_slots"]] = np.arange(len(lengths)).repeat(lengths)
    begin = 0
    for at, length in enumerate(lengths):
        slots = fixed["linear_slots"][begin : begin + length]
        assert slots[0] % CHUNK == 0 and (np.diff(slots) == 1).all()
        assert taken[slots[-1] + 1] == -1, f"no padding behind segment {at}"
        begin += length


def test_only_families_with_linear_layers_get_them() -> None:
    shapes = Shapes(tokens=(256,), tokens_per_example=32)
    for family, linear in (("qwen3_5", True), ("qwen3_vl", False)):
        for ladder in (None, shapes):
            collate = MRopeCollator(None, tiny_spec(family), packing="flatten", shapes=ladder)
            batch = collate(tiny_examples(family, images=False, videos=False))
            assert ("linear_slots" in batch) is linear
            if ladder is not None and linear:
                assert batch["linear_places"].shape == (1, 256)
                assert batch["linear_chunks"].shape == (256 // CHUNK + 9, 2)
