"""HunYuan-VL: exact small cases, a slow twin, and bad input."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrope import MRopeError, MRopeSpec, SpanMismatchError, rope_index
from support.batches import TEXT_IDS, Row, merge_rows

IMAGE = 102
BATCHES = 300
REFERENCE = "transformers-5.23"
PADDINGS = ("left", "right", "ragged", "none")


def spec_of(axes: int, merge: int = 2) -> MRopeSpec:
    return MRopeSpec("hunyuan_vl", REFERENCE, IMAGE, -1, 101, merge, extra={"axes": axes})


class Misfit(Exception):
    """The twin's word for a batch that cannot be numbered."""


def slow_index(spec: MRopeSpec, batch: dict[str, Any]) -> tuple[Any, Any]:
    """Number one token after another, in plain Python."""
    axes, merge = int(spec.extra["axes"]), spec.spatial_merge_size
    ids = batch["input_ids"].tolist()
    mask = batch["attention_mask"]
    grids = [] if batch["image_grid_thw"] is None else batch["image_grid_thw"].tolist()
    positions = np.zeros((axes, *batch["input_ids"].shape), np.int64)
    deltas = []
    image = 0
    for row, tokens in enumerate(ids):
        valid = [column for column in range(len(tokens)) if mask is None or mask[row, column]]
        largest = -1
        number = 0
        while number < len(valid):
            run = number
            while run < len(valid) and tokens[valid[run]] == IMAGE:
                run += 1
            if run > number:
                if image == len(grids):
                    raise Misfit
                places = _image_places(axes, number, run - number, grids[image], merge, image)
                image += 1
            else:
                places = [[number] * axes]
            for place in places:
                positions[:, row, valid[number]] = place
                largest = max(largest, *place)
                number += 1
        deltas.append([largest + 1 - len(valid)])
    if image != len(grids):
        raise Misfit
    return positions, np.array(deltas, np.int64).reshape(-1, 1)


def _image_places(
    axes: int, number: int, tokens: int, grid: list[int], merge: int, image: int
) -> list[list[int]]:
    height, width = grid[1] // merge, grid[2] // merge
    cells = [(column, line, image) for line in range(height) for column in range(width + 1)]
    wrapper = tokens == len(cells) + 2
    if tokens != len(cells) + 2 * wrapper:
        raise Misfit
    places = []
    for offset in range(tokens):
        own = number + offset
        cell = offset - wrapper
        inside = 0 <= cell < len(cells)
        last = list(cells[cell]) if inside else [own] * 3
        places.append([own] * (axes - 3) + last)
    return places


def random_rows(rng: random.Random, merge: int, empty: bool) -> list[Row]:
    rows = []
    for _ in range(rng.choice([1, 1, 2, 3, 5])):
        row = Row()
        rows.append(row)
        if empty and rng.random() < 0.1:
            continue
        for _ in range(rng.choice([0, 0, 1, 1, 2, 4])):
            row.add(rng.choice(TEXT_IDS), rng.choice([0, 1, 5]) if not row.types else 1)
            grid = [1, merge * rng.choice([1, 1, 2, 3, 5]), merge * rng.choice([1, 2, 2, 4])]
            row.images.append(grid)
            cells = grid[1] // merge * (grid[2] // merge + 1)
            row.add(IMAGE, cells + rng.choice([0, 2, 2]), 1)
        row.add(rng.choice(TEXT_IDS), rng.choice([0, 1, 7]) if row.tokens else rng.randrange(1, 9))
    return rows


def random_batch(rng: random.Random, merge: int, *, empty: bool = False) -> dict[str, Any]:
    rows = random_rows(rng, merge, empty)
    batch = merge_rows(rng, rows, rng.choice(PADDINGS))
    del batch["video_grid_thw"], batch["second_per_grid_ts"]
    return batch | {"images_per_sample": np.array([len(row.images) for row in rows])}


def spoil(rng: random.Random, batch: dict[str, Any]) -> dict[str, Any]:
    """Cut columns off, drop or swap grids, or turn a token into a placeholder and back."""
    batch = dict(batch)
    ids = batch["input_ids"] = batch["input_ids"].copy()
    grids = batch["image_grid_thw"]
    way = rng.choice(["left", "right", "drop", "swap", "token"])
    cut = rng.randrange(ids.shape[1]) if ids.size else 0
    if way in ("left", "right"):
        part = slice(cut, None) if way == "left" else slice(cut)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            batch[name] = None if batch[name] is None else batch[name][:, part]
    elif way == "drop" and grids is not None:
        batch["image_grid_thw"] = np.delete(grids, rng.randrange(len(grids)), axis=0)
    elif way == "swap" and grids is not None:
        batch["image_grid_thw"] = grids[::-1].copy()
    elif ids.size:
        spot = (rng.randrange(len(ids)), cut)
        ids[spot] = 7 if ids[spot] == IMAGE else IMAGE
        batch["mm_token_type_ids"] = (ids == IMAGE).astype(np.int64)
    return batch


def assert_equal(actual: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)


@settings(max_examples=BATCHES, deadline=None)
@given(rng=st.randoms(use_true_random=False), axes=st.sampled_from([3, 4, 5]))
def test_equal_to_the_twin(rng: random.Random, axes: int) -> None:
    spec = spec_of(axes, merge=rng.choice([1, 2, 3]))
    batch = random_batch(rng, spec.spatial_merge_size, empty=True)
    expected = slow_index(spec, batch)
    assert_equal(rope_index(spec, **batch), expected)
    less = batch | {"mm_token_type_ids": None, "images_per_sample": None}
    assert_equal(rope_index(spec, **less), expected)


@settings(max_examples=BATCHES, deadline=None)
@given(rng=st.randoms(use_true_random=False))
def test_a_spoilt_batch_is_refused_or_numbered_right(rng: random.Random) -> None:
    spec = spec_of(4)
    batch = spoil(rng, random_batch(rng, 2)) | {"images_per_sample": None}
    try:
        expected = slow_index(spec, batch)
    except Misfit:
        with pytest.raises(SpanMismatchError, match=r"row (\d|unknown)"):
            rope_index(spec, **batch)
    else:
        assert_equal(rope_index(spec, **batch), expected)


def test_two_rows_count_their_images_together() -> None:
    spec = spec_of(4, merge=1)
    ids = [[7, IMAGE, IMAGE, IMAGE, IMAGE, 8], [IMAGE, IMAGE, 9, 0, 0, 0]]
    mask = [[1] * 6, [1, 1, 1, 0, 0, 0]]
    positions, deltas = rope_index(spec, ids, mask, [[1, 2, 1], [1, 1, 1]])
    assert positions[:, 0].tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 0, 1, 0, 1, 5],
        [0, 0, 0, 1, 1, 5],
        [0, 0, 0, 0, 0, 5],
    ]
    assert positions[:, 1].tolist() == [
        [0, 1, 2, 0, 0, 0],
        [0, 1, 2, 0, 0, 0],
        [0, 0, 2, 0, 0, 0],
        [1, 1, 2, 0, 0, 0],
    ]
    assert deltas.tolist() == [[0], [0]]


def test_the_wrappers_of_an_image_keep_their_own_numbers() -> None:
    positions, deltas = rope_index(
        spec_of(3, merge=1),
        [[7, *[IMAGE] * 4]],
        None,
        [[1, 1, 1]],
        mm_token_type_ids=[[0, 1, 1, 1, 1]],
    )
    assert positions[:, 0].tolist() == [[0, 1, 0, 1, 4], [0, 1, 0, 0, 4], [0, 1, 0, 0, 4]]
    assert deltas.tolist() == [[0]]


def test_an_image_may_count_higher_than_the_tokens_of_its_row() -> None:
    ids = [[IMAGE, IMAGE, 7, IMAGE, IMAGE], [0, 0, 0, IMAGE, IMAGE]]
    mask = [[1] * 5, [0, 0, 0, 1, 1]]
    _, deltas = rope_index(spec_of(3, merge=1), ids, mask, [[1, 1, 1]] * 3)
    assert deltas.tolist() == [[-2], [1]]


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (1, 3)])
def test_a_batch_without_a_valid_token(shape: tuple[int, int]) -> None:
    positions, deltas = rope_index(spec_of(3), np.zeros(shape, np.int64), np.zeros(shape, np.int64))
    assert positions.shape == (3, *shape) and not positions.any()
    assert deltas.tolist() == [[0]] * shape[0]


TWO = {"input_ids": [[7, IMAGE, IMAGE, 8], [7, 8, IMAGE, IMAGE]], "image_grid_thw": [[1, 2, 2]] * 2}
TYPES = [[0, 1, 1, 0], [0, 0, 1, 1]]
MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "too few tokens": (
        {"input_ids": [[7, 8, 9], [7, IMAGE, 8]], "image_grid_thw": [[1, 2, 2]]},
        r"row 1, image 0 at valid token 1: found 1 placeholder token, but its grid \[1, 2, 2\], "
        r"merged by 2, needs 4, or 2 without wrappers",
    ),
    "one wrapper": (
        {"input_ids": [[7, IMAGE, IMAGE, IMAGE]], "image_grid_thw": [[1, 2, 2]]},
        "row 0, image 0 at valid token 1: found 3 placeholder tokens, .* needs 4, or 2",
    ),
    "two images side by side": (
        {"input_ids": [[7, *[IMAGE] * 8]], "image_grid_thw": [[1, 2, 2]] * 2},
        "row 0, image 0 at valid token 1: found 8 placeholder tokens, .* needs 4, or 2",
    ),
    "no grid": (
        {"input_ids": [[7, IMAGE, IMAGE]]},
        "row 0, image 0 at valid token 1: found 2 placeholder tokens, but there is no size for it: "
        "row 0 has 1 image span and 0 of image_grid_thw",
    ),
    "a grid too many, one row": (
        {"input_ids": [[7, IMAGE, IMAGE]], "image_grid_thw": [[1, 2, 2]] * 2},
        r"row 0, image 1: found 0 placeholder tokens, but image_grid_thw\[1\] needs 4: "
        "row 0 has 1 image span and 2 of image_grid_thw",
    ),
    "a grid too many, row unknown": (
        TWO | {"image_grid_thw": [[1, 2, 2]] * 3},
        r"row unknown \(give images_per_sample .*: found 0 .* image_grid_thw\[2\] needs 4: the "
        "batch has 2 image spans and 3 of",
    ),
    "another row's grid": (
        TWO | {"images_per_sample": [2, 0]},
        r"row 0, image 1: found 0 .* image_grid_thw\[1\] needs 4: row 0 has 1 image span and 2 of",
    ),
    "a grid of a row before": (
        TWO | {"images_per_sample": [0, 2]},
        "row 0, image 0 at valid token 1: found 2 .* row 0 has 1 image span and 0 of",
    ),
    "types of another batch": (
        TWO | {"mm_token_type_ids": TYPES[::-1]},
        "row 0, valid token 1: mm_token_type_ids says 0",
    ),
    "a span cut by the padding's side": (
        TWO | {"attention_mask": [[1] * 4, [1, 1, 1, 0]]},
        "row 1, image 0 at valid token 2: found 1 placeholder token, .* needs 4, or 2",
    ),
}


@pytest.mark.parametrize(("batch", "message"), MISFITS.values(), ids=MISFITS)
def test_a_misfit_names_row_span_and_both_counts(batch: dict[str, Any], message: str) -> None:
    with pytest.raises(SpanMismatchError, match=message) as caught:
        rope_index(spec_of(4), **batch)
    if caught.value.found is not None:
        assert caught.value.cause is not None and caught.value.cause in str(caught.value)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": [7, 8]}, r"input_ids must have shape \(B, S\)"),
        ({"input_ids": [[7.0]]}, "input_ids must hold integers"),
        ({"input_ids": [[7, 8]], "attention_mask": [[1]]}, "attention_mask has shape"),
        ({"input_ids": [[7, 8]], "attention_mask": [[1, 2]]}, "must hold 0 and 1 only"),
        ({"input_ids": [[7, 8]], "attention_mask": [[0.0, 1.0]]}, "must hold 0 and 1 only"),
        ({"input_ids": [[7]], "mm_token_type_ids": [[0, 0]]}, "mm_token_type_ids has shape"),
        ({"input_ids": [[7]], "video_grid_thw": [[1, 2, 2]]}, "hunyuan_vl has no videos"),
        ({"input_ids": [[7]], "image_grid_thw": [[2, 2, 2]]}, r"image_grid_thw\[0\] has 2 frames"),
        ({"input_ids": [[7]], "image_grid_thw": [[1, 2, 3]]}, "multiples of spatial_merge_size=2"),
        ({"input_ids": [[7]], "image_grid_thw": [[1, 2, 2**62]]}, "needs more than the 1 token"),
        ({"input_ids": [[7]], "images_per_sample": [1]}, "images_per_sample"),
    ],
)
def test_bad_arguments_are_refused(batch: dict[str, Any], message: str) -> None:
    with pytest.raises(MRopeError, match=message):
        rope_index(spec_of(3), **batch)


def test_two_axes_are_too_few() -> None:
    with pytest.raises(MRopeError, match="mrope_section has 2 axes"):
        rope_index(spec_of(2), [[7]])
