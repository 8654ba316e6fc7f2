"""MiniCPM-V 4.7: exact small cases, a slow twin, and bad input."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrope import MRopeError, SpanMismatchError, rope_index
from twins.minicpm import (
    END,
    IMAGE,
    NEWLINE,
    SLICE,
    SLICE_END,
    START,
    VIDEO,
    Misfit,
    minicpm_spec,
    random_batch,
    slow_index,
)

BATCHES = 300
MERGES = {"4x": 2, "16x": 4}
SPEC = minicpm_spec()


def spoil(rng: random.Random, batch: dict[str, Any]) -> dict[str, Any]:
    """Cut columns off, drop or swap sizes, or change a token."""
    batch = dict(batch)
    ids = batch["input_ids"] = batch["input_ids"].copy()
    way = rng.choice(["left", "right", "drop", "swap", "token", "token"])
    name = rng.choice(["target_sizes", "target_sizes_videos"])
    cut = rng.randrange(ids.shape[1])
    if way in ("left", "right"):
        part = slice(cut, None) if way == "left" else slice(cut)
        batch["input_ids"] = ids[:, part]
        batch["attention_mask"] = (
            None if batch["attention_mask"] is None else batch["attention_mask"][:, part]
        )
    elif way == "drop" and batch[name] is not None:
        batch[name] = np.delete(batch[name], rng.randrange(len(batch[name])), axis=0)
    elif way == "swap" and batch[name] is not None:
        batch[name] = batch[name][::-1].copy()
    else:
        spot = (rng.randrange(len(ids)), cut)
        ids[spot] = rng.choice([7, START, IMAGE, VIDEO, END, SLICE, SLICE_END, NEWLINE])
    return batch | dict.fromkeys(["mm_token_type_ids", "images_per_sample", "videos_per_sample"])


def assert_equal(actual: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)


@settings(max_examples=BATCHES, deadline=None)
@given(rng=st.randoms(use_true_random=False), mode=st.sampled_from(sorted(MERGES)))
def test_equal_to_the_twin(rng: random.Random, mode: str) -> None:
    batch = random_batch(rng, MERGES[mode], empty=True)
    expected = slow_index(MERGES[mode], batch)
    assert_equal(rope_index(minicpm_spec(MERGES[mode]), **batch), expected)
    less = batch | dict.fromkeys(["mm_token_type_ids", "images_per_sample", "videos_per_sample"])
    assert_equal(rope_index(SPEC, **less, downsample_mode=mode), expected)


@settings(max_examples=BATCHES, deadline=None)
@given(rng=st.randoms(use_true_random=False))
def test_a_spoilt_batch_is_refused_or_numbered_right(rng: random.Random) -> None:
    batch = spoil(rng, random_batch(rng, 4))
    try:
        expected = slow_index(4, batch)
    except Misfit:
        with pytest.raises(SpanMismatchError, match=r"row (\d|unknown)"):
            rope_index(SPEC, **batch)
    else:
        assert_equal(rope_index(SPEC, **batch), expected)


@pytest.mark.parametrize("cells", range(1, 41))
def test_a_thumbnail_is_stretched_as_by_torch(cells: int) -> None:
    # In float64, 32 of the 6400 pairs of sides would be rounded otherwise.
    for over in range(1, 161):
        ids = [[START, *[IMAGE] * cells, END, *[SLICE, IMAGE, SLICE_END] * over]]
        sizes = [[4, 4 * cells], *[[4, 4]] * over]
        positions, _ = rope_index(SPEC, ids, target_sizes=sizes)
        expected = torch.linspace(0, over - 1, cells).round().long().tolist()
        assert positions[2, 0, 1 : cells + 1].tolist() == expected


def test_two_lines_of_slices_and_a_stretched_thumbnail() -> None:
    one = [SLICE, IMAGE, IMAGE, SLICE_END]
    ids = [[7, START, *[IMAGE] * 4, END, *one, *one, NEWLINE, *one, *one, 8]]
    positions, deltas = rope_index(SPEC, ids, target_sizes=[[8, 8], *[[4, 8]] * 4])
    assert positions[:, 0].tolist() == [
        [0, *[1] * 23, 6],
        [0, 0, 1, 1, 2, 2, 3, *[1, 1, 1, 1], *[1, 1, 1, 1], 1, *[2, 2, 2, 2], *[2, 2, 2, 2], 6],
        [0, 0, 1, 4, 1, 4, 5, *[1, 1, 2, 2], *[3, 3, 4, 4], 5, *[1, 1, 2, 2], *[3, 3, 4, 4], 6],
    ]
    assert deltas.tolist() == [[7 - 25]]


def test_frames_of_a_video_stand_one_after_another() -> None:
    frame = [START, VIDEO, VIDEO, END]
    ids, mask = [[0, *frame, *frame, 7]], [[0, *[1] * 9]]
    positions, deltas = rope_index(SPEC, ids, mask, target_sizes_videos=[[4, 8]] * 2)
    assert positions[:, 0].tolist() == [
        [0, 0, 0, 0, 0, 3, 3, 3, 3, 6],
        [0, 0, 0, 0, 1, 2, 3, 3, 4, 6],
        [0, 0, 0, 1, 2, 2, 3, 4, 5, 6],
    ]
    assert deltas.tolist() == [[-2]]


def test_a_frame_ends_with_its_row() -> None:
    ids = [[START, IMAGE, END], [NEWLINE, 7, 8]]
    positions, deltas = rope_index(SPEC, ids, target_sizes=[[4, 4]])
    assert positions[:, 0].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 1]]
    assert positions[:, 1].tolist() == [[0, 1, 2]] * 3
    assert deltas.tolist() == [[-1], [0]]


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (1, 3)])
def test_a_batch_without_a_valid_token(shape: tuple[int, int]) -> None:
    positions, deltas = rope_index(SPEC, np.zeros(shape, np.int64), np.zeros(shape, np.int64))
    assert positions.shape == (3, *shape) and not positions.any()
    assert deltas.tolist() == [[1]] * shape[0]


ONE = [START, IMAGE, IMAGE, END]
CUT = [SLICE, IMAGE, SLICE_END]
CLIP = [SLICE, VIDEO, SLICE_END]
UNOPENED = "but neither the image start nor"
MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "a token too few": (
        {"input_ids": [[7] * 5, [7, *ONE]], "target_sizes": [[4, 12]]},
        r"row 1, image 0 at valid token 2: found 2 placeholder tokens, but target_sizes\[0\] = "
        r"\[4, 12\], merged by 4, needs 3",
    ),
    "a single token for a long run, which torch would broadcast": (
        {"input_ids": [ONE], "target_sizes": [[4, 4]]},
        "row 0, image 0 at valid token 1: found 2 placeholder tokens, but .* needs 1",
    ),
    "no size": (
        {"input_ids": [ONE]},
        "row 0, image 0 at valid token 1: found 2 placeholder tokens, but there is no size for it: "
        "row 0 has 1 image span and 0 of target_sizes",
    ),
    "a size too many": (
        {"input_ids": [ONE], "target_sizes": [[4, 8], [8, 8]]},
        r"row 0, image 1: found 0 placeholder tokens, but target_sizes\[1\] needs 4: "
        "row 0 has 1 image span and 2 of",
    ),
    "a size too many, row unknown": (
        {"input_ids": [ONE, ONE], "target_sizes": [[4, 8]] * 3},
        r"row unknown \(give images_per_sample .* found 0 .* target_sizes\[2\] needs 2: the batch "
        "has 2 image spans and 3 of",
    ),
    "a size of another row": (
        {"input_ids": [ONE, ONE], "target_sizes": [[4, 8]] * 2, "images_per_sample": [2, 0]},
        r"row 0, image 1: found 0 .* target_sizes\[1\] needs 2: row 0 has 1 image span and 2 of",
    ),
    "a video's size of another row": (
        {
            "input_ids": [[START, VIDEO], [START, VIDEO]],
            "target_sizes_videos": [[4, 4]] * 2,
            "videos_per_sample": [0, 2],
        },
        "row 0, video 0 at valid token 1: found 1 .* row 0 has 1 video span and 0 of target_sizes_",
    ),
    "an image for a video": (
        {"input_ids": [ONE], "target_sizes_videos": [[4, 8]]},
        "row 0, image 0 at valid token 1: found 2 .* row 0 has 1 image span and 0 of target_sizes",
    ),
    "types of another batch": (
        {"input_ids": [ONE], "target_sizes": [[4, 8]], "mm_token_type_ids": [[0, 2, 2, 0]]},
        r"row 0, valid token 1: mm_token_type_ids says 2 \(video\)",
    ),
    "a row that begins inside of an image": (
        {"input_ids": [[7] * 4, [*ONE[1:], 7]], "target_sizes": [[4, 8]]},
        f"row 1, image 0 at valid token 0: found 2 placeholder tokens, {UNOPENED}",
    ),
    "a row that begins with a slice": (
        {"input_ids": [ONE, [7, *CUT]], "target_sizes": [[4, 8], [4, 4]]},
        f"row 1, image 0 at valid token 2: found 1 placeholder token, {UNOPENED}",
    ),
    "a slice that is the first of all": (
        {"input_ids": [[7, *CUT]], "target_sizes": [[4, 4]]},
        f"row 0, image 0 at valid token 2: found 1 placeholder token, {UNOPENED}",
    ),
    "a slice whose thumbnail is the row before's": (
        {"input_ids": [[*ONE, END, END, END, END], CUT], "target_sizes": [[4, 8], [4, 4]]},
        f"row 1, image 0 at valid token 1: found 1 placeholder token, {UNOPENED}",
    ),
    "an image whose start is the row before's": (
        {"input_ids": [[*[7] * 7, START], ONE[1:]], "target_sizes": [[4, 8]]},
        f"row 1, image 0 at valid token 0: found 2 placeholder tokens, {UNOPENED}",
    ),
    "a slice after text": (
        {"input_ids": [[*ONE, 7, *CUT]], "target_sizes": [[4, 8], [4, 4]]},
        f"row 0, image 1 at valid token 6: found 1 placeholder token, {UNOPENED}",
    ),
    "a video's slice after an image": (
        {"input_ids": [[*ONE, *CLIP]], "target_sizes": [[4, 8]], "target_sizes_videos": [[4, 4]]},
        f"row 0, video 0 at valid token 5: found 1 placeholder token, {UNOPENED}",
    ),
    "a placeholder in text": (
        {"input_ids": [[7, IMAGE]], "target_sizes": [[4, 4]]},
        f"row 0, image 0 at valid token 1: found 1 placeholder token, {UNOPENED}",
    ),
}


@pytest.mark.parametrize(("batch", "message"), MISFITS.values(), ids=MISFITS)
def test_a_misfit_names_row_span_and_both_counts(batch: dict[str, Any], message: str) -> None:
    batch = batch | {"input_ids": [row + [7] * (8 - len(row)) for row in batch["input_ids"]]}
    if "mm_token_type_ids" in batch:
        batch["mm_token_type_ids"] = [row + [0] * 4 for row in batch["mm_token_type_ids"]]
    with pytest.raises(SpanMismatchError, match=message) as caught:
        rope_index(SPEC, **batch)
    assert caught.value.cause is not None and caught.value.cause in str(caught.value)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": [7, 8]}, r"input_ids must have shape \(B, S\)"),
        ({"input_ids": [[7, 8]], "attention_mask": [[1]]}, "attention_mask has shape"),
        ({"input_ids": [[7, 8]], "attention_mask": [[1, 2]]}, "must hold 0 and 1 only"),
        ({"input_ids": [[7]], "image_grid_thw": [[1, 4, 4]]}, "minicpmv4_7 has target_sizes"),
        ({"input_ids": [[7]], "target_sizes": [[1, 4, 4]]}, r"must have shape \(N, 2\)"),
        ({"input_ids": [[7]], "target_sizes": [[4.0, 4.0]]}, "must hold integers"),
        ({"input_ids": [[7]], "target_sizes": [[4, 3]]}, r"target_sizes\[0\] = \[4, 3\]: .* 4 \("),
        ({"input_ids": [[7]], "target_sizes": [[4, 2**62]]}, r"target_sizes\[0\] = "),
        ({"input_ids": [[7]], "downsample_mode": "8x"}, "downsample_mode must be one of 4x, 16x"),
        ({"input_ids": [[7]], "images_per_sample": [1]}, r"images_per_sample = \[1\] does not fit"),
        ({"input_ids": [[7]], "videos_per_sample": [0, 0]}, "videos_per_sample"),
    ],
)
def test_bad_arguments_are_refused(batch: dict[str, Any], message: str) -> None:
    with pytest.raises(MRopeError, match=message):
        rope_index(SPEC, **batch)
