"""What linear attention reads of a row: checked by hand, and against a slow twin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mrope import MRopeCollator, Shapes
from mrope.collate.linear_columns import CHUNK, GAP, linear_columns
from support.models import tiny_examples, tiny_spec


def test_two_segments() -> None:
    found = linear_columns(np.array([3, 2]))
    assert found["linear_places"].tolist() == [[0, 1, 2, 0, 1]]
    assert found["linear_chunks"].tolist() == [[0, 0], [1, 0]]
    assert found["linear_slots"].tolist() == [0, 1, 2, CHUNK, CHUNK + 1]
    assert found["linear_shape"] == [2, CHUNK]


def test_short_segments_share_a_row() -> None:
    found = linear_columns(np.array([CHUNK, 2, 3 * CHUNK]))
    assert found["linear_shape"] == [2, 3 * CHUNK]
    # The longest fills the first row; 64 tokens and the empty slot behind them take two chunks.
    second, third = 3 * CHUNK, 5 * CHUNK
    slots = [*range(second, second + CHUNK), third, third + 1, *range(3 * CHUNK)]
    assert found["linear_slots"].tolist() == slots


def test_fixed_shapes_have_an_empty_slot_between_segments() -> None:
    found = linear_columns(np.array([CHUNK, 2]), most=3)
    assert found["linear_slots"].tolist() == [*range(CHUNK), 2 * CHUNK, 2 * CHUNK + 1]
    assert found["linear_shape"] == [1, 4 * CHUNK]
    # Segment 1 ends before its chunk 2.
    assert found["linear_chunks"].tolist() == [[0, 0], [1, 0], [1, 2], [1, 2]]


@pytest.mark.parametrize("longest", [3 * CHUNK, 40 * CHUNK])
@pytest.mark.parametrize("seed", range(20))
def test_as_a_loop_finds_them(seed: int, longest: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, rng.integers(1, 40))
    lengths[rng.random(len(lengths)) < 0.2] = CHUNK * int(rng.integers(1, 4))
    tail = int(rng.integers(longest))
    segments = [*lengths.tolist(), tail][: len(lengths) + (tail > 0)]
    most = len(segments) + int(rng.integers(3))
    free, fixed = linear_columns(lengths, tail), linear_columns(lengths, tail, most)
    chunks = [[at, one] for at, n in enumerate(segments) for one in range(-(-n // CHUNK))]
    assert free["linear_chunks"].tolist() == chunks
    assert fixed["linear_chunks"][: len(chunks)].tolist() == chunks
    for segment, chunk in fixed["linear_chunks"][len(chunks) :]:
        assert chunk * CHUNK >= segments[segment]
    assert len(fixed["linear_chunks"]) == sum(segments) // CHUNK + most
    check_slots(free, segments)
    check_slots(fixed, segments, tail > 0)


def check_slots(columns: Any, segments: list[int], loose: bool = False) -> None:
    """Each segment lies in one row, begins a chunk, behind a gap; the last may lie loose."""
    rows, width = columns["linear_shape"]
    slots = columns["linear_slots"]
    assert len(set(slots.tolist())) == len(slots) == sum(segments)
    assert slots.min() >= 0 and slots.max() < rows * width
    taken, begin = set(slots.tolist()), 0
    for length in segments[: len(segments) - loose]:
        own = slots[begin : begin + length]
        assert own[0] % CHUNK == 0 and (np.diff(own) == 1).all()
        assert own[0] // width == own[-1] // width
        gap = {*range(own[0] - GAP, own[0])}
        assert own[0] % width == 0 or not taken & gap, "a state runs into the segment"
        begin += length


def test_examples_that_leave_rows_half_empty_take_more_rows() -> None:
    """Of 15 examples of 520 tokens none shares a row with another."""
    lengths, most = np.full(15, 520), 32
    tail = 8192 - int(lengths.sum())
    found = linear_columns(lengths, tail, most)
    rows, width = found["linear_shape"]
    assert width == 1024 and rows >= 15
    check_slots(found, [*lengths.tolist(), tail], loose=True)
    fewer = linear_columns(np.full(15, 400), 8192 - 6000, most)["linear_shape"]
    assert fewer == [11, 1024]


def test_many_short_examples_take_few_rows() -> None:
    """As many as a rung has borders for, of a chunk each, would take 81 rows."""
    lengths = np.full(400, 20)
    found = linear_columns(lengths, 192, 512)
    assert found["linear_shape"] == [44, 1024]  # of 25 that are taken, by doubling 11
    check_slots(found, [*lengths.tolist(), 192], loose=True)


@pytest.mark.parametrize("longest", [100, 900, 3000])
def test_fixed_shapes_differ_by_the_longest_example_alone(longest: int) -> None:
    shapes = set()
    for seed in range(50):
        rng, lengths = np.random.default_rng(seed), [longest]
        while len(lengths) < 31 and sum(lengths) < 7000:
            lengths.append(int(rng.integers(1, longest + 1)))
        lengths = lengths if sum(lengths) <= 8192 else lengths[:-1]
        tail = 8192 - sum(lengths)
        found = linear_columns(np.array(lengths), tail, 32)
        shapes.add(tuple(found["linear_shape"]))
    assert len(shapes) == 1


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
