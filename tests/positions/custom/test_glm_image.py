"""GLM-Image: exact small cases, a slow twin, and bad input."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrope import MRopeError, MRopeSpec, SpanMismatchError, rope_index
from support.batches import TEXT_IDS, Row, merge_rows

START, IMAGE, END = 101, 102, 103
BATCHES = 300
REFERENCE = "transformers-5.23"
PADDINGS = ("left", "right", "ragged", "none")
SPEC = MRopeSpec("glm_image", REFERENCE, IMAGE, -1, START, 1, extra={"image_end_token_id": END})


class Misfit(Exception):
    """The twin's word for a batch that cannot be numbered."""


def slow_index(batch: dict[str, Any]) -> tuple[Any, Any]:
    """Number one token after another, in plain Python."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    grids = [] if batch["image_grid_thw"] is None else batch["image_grid_thw"].tolist()
    positions = np.ones((3, *ids.shape), np.int64)
    # Counts can be left out where no row has an image.
    counts = batch["images_per_sample"] if grids else np.zeros(len(ids), np.int64)
    first = 0
    for row, count in enumerate(counts.tolist()):
        columns = [c for c in range(ids.shape[1]) if mask is None or mask[row, c]]
        tokens = ids[row, columns].tolist()
        points = _number_row(tokens, grids[first : first + count])
        first += count
        for column, point in zip(columns, points, strict=True):
            positions[:, row, column] = point
    return positions, np.zeros((len(ids), 1), np.int64)


def _number_row(tokens: list[int], grids: list[list[int]]) -> list[tuple[int, int, int]]:
    points: list[tuple[int, int, int]] = []
    images = 0
    here = 0
    number = 0
    while number < len(tokens):
        token = tokens[number]
        if token in (IMAGE, END):
            raise Misfit
        points.append((here, here, here))
        here += 1
        number += 1
        # The ends that are left, not this one's: a start without an end is text.
        if token != START or END not in tokens[number:]:
            continue
        if images == len(grids):
            raise Misfit
        frames, height, width = grids[images]
        images += 1
        end = tokens.index(END, number)
        if end - number != frames * height * width or START in tokens[number:end]:
            raise Misfit
        for cell in range(end - number):
            frame, place = divmod(cell, height * width)
            points.append((here + frame, here + place // width, here + place % width))
        here += max(height, width)
        points.append((here, here, here))
        here += 1
        number = end + 1
    if images < len(grids) and tokens.count(START) == images:
        raise Misfit
    return points


def random_rows(rng: random.Random, empty: bool) -> list[Row]:
    rows = []
    for _ in range(rng.choice([1, 1, 2, 3, 5])):
        row = Row()
        rows.append(row)
        if empty and rng.random() < 0.1:
            continue
        for _ in range(rng.choice([0, 0, 1, 1, 2, 4])):
            row.add(rng.choice(TEXT_IDS), rng.choice([0, 1, 5]))
            grid = [rng.choice([1, 1, 1, 3]), rng.choice([1, 2, 3, 7]), rng.choice([1, 2, 4, 5])]
            row.images.append(grid)
            row.add(START, 1)
            row.add(rng.choice([IMAGE, *TEXT_IDS]), grid[0] * grid[1] * grid[2])
            row.add(END, 1)
        row.add(rng.choice(TEXT_IDS), rng.choice([0, 1, 7]) if row.tokens else rng.randrange(1, 9))
        if rng.random() < 0.6:
            row.images += [[1, rng.randrange(1, 9), 4] for _ in range(rng.choice([0, 1, 2]))]
            row.add(START, rng.choice([1, 1, 1, 2]))
            row.add(rng.choice(TEXT_IDS), rng.choice([0, 0, 3]))
    return rows


def random_batch(rng: random.Random, *, empty: bool = False) -> dict[str, Any]:
    rows = random_rows(rng, empty)
    batch = merge_rows(rng, rows, rng.choice(PADDINGS))
    # The tokenizer's own padding token is the end token.
    batch["input_ids"][batch["input_ids"] == 0] = rng.choice([0, END])
    names = ("input_ids", "attention_mask", "image_grid_thw")
    counts = np.array([len(row.images) for row in rows])
    return {name: batch[name] for name in names} | {"images_per_sample": counts}


def spoil(rng: random.Random, batch: dict[str, Any]) -> dict[str, Any]:
    """Cut columns off, swap grids, move them to another row, or change a token."""
    batch = dict(batch)
    ids = batch["input_ids"] = batch["input_ids"].copy()
    way = rng.choice(["left", "right", "swap", "count", "token"])
    cut = rng.randrange(ids.shape[1])
    if way in ("left", "right"):
        part = slice(cut, None) if way == "left" else slice(cut)
        for name in ("input_ids", "attention_mask"):
            batch[name] = None if batch[name] is None else batch[name][:, part]
    elif way == "swap" and batch["image_grid_thw"] is not None:
        batch["image_grid_thw"] = batch["image_grid_thw"][::-1].copy()
    elif way == "count":
        batch["images_per_sample"] = batch["images_per_sample"][::-1].copy()
    else:
        ids[rng.randrange(len(ids)), cut] = rng.choice([START, IMAGE, END, 7])
    return batch


def assert_equal(actual: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)


@settings(max_examples=BATCHES, deadline=None)
@given(rng=st.randoms(use_true_random=False))
def test_equal_to_the_twin(rng: random.Random) -> None:
    batch = random_batch(rng, empty=True)
    expected = slow_index(batch)
    assert_equal(rope_index(SPEC, **batch), expected)
    if len(batch["input_ids"]) == 1:
        assert_equal(rope_index(SPEC, **(batch | {"images_per_sample": None})), expected)


@settings(max_examples=BATCHES, deadline=None)
@given(rng=st.randoms(use_true_random=False))
def test_a_spoilt_batch_is_refused_or_numbered_right(rng: random.Random) -> None:
    batch = spoil(rng, random_batch(rng))
    try:
        expected = slow_index(batch)
    except Misfit:
        with pytest.raises(SpanMismatchError, match=r"row \d, image \d"):
            rope_index(SPEC, **batch)
    else:
        assert_equal(rope_index(SPEC, **batch), expected)


def test_a_source_and_what_is_to_be_drawn() -> None:
    ids = [
        [7, START, *[IMAGE] * 6, END, 8, START],
        [END, END, END, END, END, END, END, END, 7, 8, START],
    ]
    mask = [[1] * 11, [0] * 8 + [1] * 3]
    positions, deltas = rope_index(
        SPEC, ids, mask, [[1, 3, 2], [1, 4, 4], [1, 9, 9], [1, 2, 2]], images_per_sample=[2, 2]
    )
    assert positions[:, 0].tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7],
        [0, 1, 2, 2, 3, 3, 4, 4, 5, 6, 7],
        [0, 1, 2, 3, 2, 3, 2, 3, 5, 6, 7],
    ]
    assert positions[:, 1].tolist() == [[1] * 8 + [0, 1, 2]] * 3
    assert deltas.tolist() == [[0], [0]]


def test_frames_do_not_move_what_follows() -> None:
    positions, _ = rope_index(SPEC, [[START, 5, 5, 5, END, 7]], image_grid_thw=[[3, 1, 1]])
    assert positions[:, 0].tolist() == [[0, 1, 2, 3, 2, 3], [0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 2, 3]]


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (1, 3)])
def test_a_batch_without_a_valid_token(shape: tuple[int, int]) -> None:
    none = np.zeros(shape, np.int64)
    positions, deltas = rope_index(SPEC, none, none)
    assert positions.shape == (3, *shape) and (positions == 1).all()
    assert deltas.tolist() == [[0]] * shape[0]


PAIR = [START, IMAGE, IMAGE, END]
MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "a token too few": (
        {"input_ids": [[7, *PAIR]], "image_grid_thw": [[1, 1, 3]]},
        r"row 0, image 0 at valid token 2: found 2 placeholder tokens, but image_grid_thw\[0\] = "
        r"\[1, 1, 3\] needs 3",
    ),
    "one image too long and one too short": (
        {"input_ids": [PAIR + PAIR], "image_grid_thw": [[1, 1, 1], [1, 1, 3]]},
        "row 0, image 0 at valid token 1: found 2 placeholder tokens, but .* needs 1",
    ),
    "no grid": (
        {"input_ids": [[7, 8, 8, 8], PAIR]},
        "row 1, image 0 at valid token 1: found 2 placeholder tokens, but there is no grid for "
        "it: row 1 has, by count, 1 images and 0 grids",
    ),
    "a neighbour's grid": (
        {
            "input_ids": [PAIR, [7] * 4],
            "image_grid_thw": [[1, 1, 2]] * 2,
            "images_per_sample": [2, 0],
        },
        r"row 0, image 1: found 0 tokens, but image_grid_thw\[1\] needs 2: the row has, by count, "
        "1 images and 2 grids, and draws nothing",
    ),
    "a grid given to the row before": (
        {"input_ids": [PAIR, PAIR], "image_grid_thw": [[1, 1, 2]] * 2, "images_per_sample": [2, 0]},
        "row 1, image 0 at valid token 1: found 2 placeholder tokens, but there is no grid for "
        "it: row 1 has, by count, 1 images and 0 grids",
    ),
    "a row without a token": (
        {
            "input_ids": [PAIR, PAIR],
            "attention_mask": [[1] * 4, [0] * 4],
            "image_grid_thw": [[1, 1, 2]] * 2,
            "images_per_sample": [1, 1],
        },
        r"row 1, image 0: found 0 tokens, but image_grid_thw\[1\] needs 2",
    ),
    "truncated inside of its first image": (
        {"input_ids": [PAIR[2:] + PAIR], "image_grid_thw": [[1, 1, 2]] * 2},
        "row 0, image 0 at valid token 1: its end token is number 1 of the row, but 0 start tokens",
    ),
    "truncated inside of its last image": (
        {"input_ids": [PAIR + PAIR[:-1]], "image_grid_thw": [[1, 1, 2], [1, 2, 2]]},
        "row 0, image 1 at valid token 5: found 2 placeholder tokens, but not between a start and "
        "an end token, and the row's next grid needs 4",
    ),
    "a placeholder in text": (
        {"input_ids": [[7, IMAGE]]},
        "row 0, image 0 at valid token 1: found 1 placeholder token, but not between .* needs 0",
    ),
    "two starts": (
        {"input_ids": [[START, *PAIR]], "image_grid_thw": [[1, 1, 3]]},
        "row 0, image 0 at valid token 4: its end token is number 1 of the row, but 2 start tokens",
    ),
    "padding without a mask": (
        {"input_ids": [[END, END, *PAIR]], "image_grid_thw": [[1, 1, 2]]},
        "row 0, image 0 at valid token 0: .* 0 start tokens .* pads with the end token",
    ),
}


@pytest.mark.parametrize(("batch", "message"), MISFITS.values(), ids=MISFITS)
def test_a_misfit_names_row_span_and_both_counts(batch: dict[str, Any], message: str) -> None:
    with pytest.raises(SpanMismatchError, match=message) as caught:
        rope_index(SPEC, **batch)
    assert caught.value.cause is not None and caught.value.cause in str(caught.value)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"input_ids": [PAIR, PAIR], "image_grid_thw": [[1, 1, 2]] * 2},
            "a batch of 2 rows and 2 grids needs images_per_sample",
        ),
        ({"input_ids": [7, 8]}, r"input_ids must have shape \(B, S\)"),
        ({"input_ids": [[7, 8]], "attention_mask": [[1]]}, "attention_mask has shape"),
        ({"input_ids": [[7, 8]], "attention_mask": [[1, 2]]}, "must hold 0 and 1 only"),
        ({"input_ids": [[7]], "video_grid_thw": [[1, 2, 2]]}, "glm_image has no videos"),
        ({"input_ids": [[START]], "image_grid_thw": [[1, 2, 0]]}, "size must be at least 1"),
        ({"input_ids": [[START]], "image_grid_thw": [[1, 2]]}, r"must have shape \(N, 3\)"),
        ({"input_ids": [[7]], "images_per_sample": [1]}, "images_per_sample"),
    ],
)
def test_bad_arguments_are_refused(batch: dict[str, Any], message: str) -> None:
    with pytest.raises(MRopeError, match=message):
        rope_index(SPEC, **batch)
