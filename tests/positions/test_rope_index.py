"""Ring 1: exact tiny arrays, one for each thing the rules say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mrope import MRopeError, MRopeSpec, rope_index
from mrope.spec.references import REFERENCES
from mrope.spec.spec import example_config
from support.batches import SPAN_ROWS

START, IMAGE, VIDEO = 101, 102, 103
OLD, MIDDLE, NEW = REFERENCES


def spec_of(family: str = "qwen3_vl", reference: str = NEW) -> MRopeSpec:
    return MRopeSpec.from_config(example_config(family), reference)


def numbers(position_ids: Any, row: int = 0) -> list[tuple[int, int, int]]:
    """Return (t, h, w) of each token of a row."""
    return [tuple(token) for token in position_ids[:, row].T.tolist()]


def times(position_ids: Any, row: int = 0) -> list[int]:
    return list(position_ids[0, row].tolist())


def test_output_shapes_and_dtypes() -> None:
    ids, delta = rope_index(spec_of(), np.full((2, 5), 7, np.int32))
    assert ids.shape == (3, 2, 5) and ids.dtype == np.int64
    assert delta.shape == (2, 1) and delta.dtype == np.int64


def test_text_counts_up_on_all_three_axes() -> None:
    ids, delta = rope_index(spec_of(), [[7, 8, 9]])
    assert numbers(ids) == [(0, 0, 0), (1, 1, 1), (2, 2, 2)]
    assert delta.tolist() == [[0]]


def test_an_image_counts_rows_and_columns_and_text_goes_on_after_its_larger_side() -> None:
    tokens = [[7, *[IMAGE] * 6, 8]]
    ids, delta = rope_index(spec_of(), tokens, image_grid_thw=[[1, 4, 6]])
    assert numbers(ids) == [
        (0, 0, 0),
        (1, 1, 1), (1, 1, 2), (1, 1, 3),
        (1, 2, 1), (1, 2, 2), (1, 2, 3),
        (4, 4, 4),
    ]  # fmt: skip
    assert delta.tolist() == [[5 - 8]]


def test_frames_that_stand_apart_are_each_numbered_as_an_image() -> None:
    tokens = [[START, *[VIDEO] * 2, 7, START, *[VIDEO] * 2]]
    ids, _ = rope_index(spec_of(), tokens, video_grid_thw=[[2, 2, 4]])
    assert numbers(ids) == [
        (0, 0, 0), (1, 1, 1), (1, 1, 2), (3, 3, 3), (4, 4, 4), (5, 5, 5), (5, 5, 6),
    ]  # fmt: skip


def test_a_clip_in_one_piece_moves_time_on_frame_by_frame() -> None:
    tokens = [[*[VIDEO] * 6, 8]]
    ids, delta = rope_index(spec_of("qwen2_vl"), tokens, video_grid_thw=[[3, 2, 4]])
    assert numbers(ids) == [
        (0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1), (2, 0, 0), (2, 0, 1), (2, 2, 2),
    ]  # fmt: skip
    assert delta.tolist() == [[3 - 7]]


@pytest.mark.parametrize(("reference", "text"), [(OLD, 5), (MIDDLE, 1), (NEW, 1)])
def test_where_text_goes_on_after_a_clip_longer_than_its_sides(reference: str, text: int) -> None:
    tokens = [[START, *[VIDEO] * 4, 8]]
    ids, delta = rope_index(spec_of("qwen2_vl", reference), tokens, video_grid_thw=[[4, 2, 2]])
    assert times(ids) == [0, 1, 2, 3, 4, text + (reference != OLD)]
    assert delta.tolist() == [[5 + (reference == OLD) - 6]]


@pytest.mark.parametrize(
    ("reference", "fill", "delta"), [(OLD, 1, [-2, -4]), (MIDDLE, 0, [-2, -2]), (NEW, 0, [-2, -2])]
)
def test_fill_and_delta_of_padded_rows(reference: str, fill: int, delta: list[int]) -> None:
    row = [START, *[IMAGE] * 4, 8]
    tokens = [[*row, 7, 7], [0, 0, *row]]
    mask = [[1] * 8, [0] * 2 + [1] * 6]
    grid = [[1, 4, 4]] * 2
    ids, rope_deltas = rope_index(spec_of(reference=reference), tokens, mask, grid)
    assert numbers(ids, 1)[:2] == [(fill,) * 3] * 2
    assert numbers(ids, 1)[2:] == numbers(ids, 0)[:6]
    assert rope_deltas[:, 0].tolist() == delta


def test_a_text_batch_takes_the_fill_into_its_delta_in_the_oldest_reference_only() -> None:
    tokens, mask = [[7, 0, 0]], [[1, 0, 0]]
    deltas = {
        name: rope_index(spec_of(reference=name), tokens, mask)[1].item() for name in REFERENCES
    }
    assert deltas == {OLD: 2 - 3, MIDDLE: 0, NEW: 0}


@pytest.mark.parametrize(
    ("reference", "seconds", "expected"),
    [
        (OLD, 0.5, [0, 0, 0, 0, 0]),
        (MIDDLE, 0.5, [0, 0, 0, 0, 0]),
        (NEW, 0.5, [0, 1, 2, 3, 4]),
        (NEW, 0.4, [0, 0, 1, 2, 3]),
        (NEW, 1 / 3, [0, 0, 1, 2, 2]),
        (MIDDLE, 1.5, [0, 2, 4, 6, 8]),
        (NEW, 1.5, [0, 3, 6, 9, 12]),
        (NEW, None, [0, 2, 4, 6, 8]),
    ],
)
def test_seconds_of_a_timed_clip(reference: str, seconds: Any, expected: list[int]) -> None:
    tokens = [[START, *[VIDEO] * 5]]
    spec = spec_of("qwen2_5_vl", reference)
    given = None if seconds is None else [seconds]
    ids, _ = rope_index(spec, tokens, video_grid_thw=[[5, 2, 2]], second_per_grid_ts=given)
    assert [time - 1 for time in times(ids)[1:]] == expected


def test_seconds_are_multiplied_in_float32() -> None:
    # Frame 45 at 1.4 positions a frame: 63.0 in float32, 62.99999999999999 in float64.
    tokens = [[VIDEO] * 46]
    ids, _ = rope_index(spec_of("qwen2_5_vl"), tokens, None, None, [[46, 2, 2]], [0.7])
    assert times(ids)[45] == 63 and int(45 * (2 * 0.7)) == 62


def test_a_float32_array_of_seconds_is_float32_before_the_rate_too() -> None:
    # 3 * 0.9 is 2.6999998 in float32, and 2.7 rounded to float32 where Python multiplied it.
    config = example_config("qwen2_5_vl")
    config["vision_config"]["tokens_per_second"] = 3
    spec = MRopeSpec.from_config(config, NEW)
    found = {}
    for name, seconds in (("array", np.array([0.9], np.float32)), ("list", [0.9])):
        ids, _ = rope_index(spec, [[VIDEO] * 11], None, None, [[11, 2, 2]], seconds)
        found[name] = times(ids)[10]
    assert found == {"array": 26, "list": 27}


def test_images_of_timed_families_stand_still_in_the_oldest_reference_only() -> None:
    tokens = [[START, *[IMAGE] * 2]]
    steps = {}
    for name in REFERENCES:
        ids, _ = rope_index(spec_of("qwen2_5_vl", name), tokens, image_grid_thw=[[2, 2, 2]])
        steps[name] = times(ids)[2] - times(ids)[1]
    assert steps == {OLD: 0, MIDDLE: 1, NEW: 1}


def test_spans_side_by_side_are_cut_by_their_grids() -> None:
    tokens = [[*[IMAGE] * 2, *[IMAGE] * 4, *[VIDEO] * 2]]
    ids, _ = rope_index(spec_of(), tokens, None, [[1, 2, 4], [1, 4, 4]], [[2, 2, 2]])
    assert numbers(ids) == [
        (0, 0, 0), (0, 0, 1),
        (2, 2, 2), (2, 2, 3), (2, 3, 2), (2, 3, 3),
        (4, 4, 4),
        (5, 5, 5),
    ]  # fmt: skip


def test_spans_side_by_side_across_two_rows_stay_in_their_rows() -> None:
    tokens = [[IMAGE, IMAGE], [IMAGE, IMAGE]]
    ids, _ = rope_index(spec_of(), tokens, None, [[1, 2, 2]] * 4)
    assert times(ids, 0) == times(ids, 1) == [0, 1]


def test_rows_are_numbered_on_their_own_however_they_are_padded() -> None:
    left = rope_index(spec_of(), [[0, 7, 8]], [[0, 1, 1]])[0]
    inner = rope_index(spec_of(), [[7, 0, 8]], [[1, 0, 1]])[0]
    right = rope_index(spec_of(), [[7, 8, 0]], [[True, True, False]])[0]
    assert times(left) == [0, 0, 1]
    assert times(inner) == [0, 0, 1]
    assert times(right) == [0, 1, 0]


@pytest.mark.parametrize(("family", "reference"), SPAN_ROWS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0), (1, 1), (2, 1)])
def test_empty_and_shortest_batches(family: str, reference: str, shape: tuple[int, int]) -> None:
    spec = spec_of(family, reference)
    tokens = np.full(shape, 7)
    for mask in (None, np.ones(shape, np.int64)):
        ids, delta = rope_index(spec, tokens, mask)
        assert ids.shape == (3, *shape) and not ids.any()
        assert delta.tolist() == [[0]] * shape[0]


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_row_of_padding_alone_takes_nothing_from_its_neighbours(reference: str) -> None:
    spec = spec_of(reference=reference)
    row = [START, *[IMAGE] * 4]
    mask = [[1] * 5, [0] * 5, [1] * 5]
    grids = [[1, 4, 4]] * 2
    ids, _ = rope_index(spec, [row, [0] * 5, row], mask, grids)
    assert numbers(ids, 1) == [(spec.conventions.fill,) * 3] * 5
    assert (
        numbers(ids, 0)
        == numbers(ids, 2)
        == [(0, 0, 0), (1, 1, 1), (1, 1, 2), (1, 2, 1), (1, 2, 2)]
    )


def test_a_long_row_of_thousands_of_frames() -> None:
    frames, width = 4096, 131072
    frame = [START, *[VIDEO] * 24, 7]
    tokens = np.full((1, width), 8)
    tokens[0, : frames * len(frame)] = frame * frames
    ids, delta = rope_index(spec_of(), tokens, video_grid_thw=[[frames, 8, 12]])
    # A frame of 4 x 6 takes one marker, 6 positions and one text token.
    last = 8 * frames + width - frames * len(frame) - 1
    assert numbers(ids)[-1] == (last,) * 3
    assert delta.item() == last + 1 - width
    assert (ids[0, 0, :-1] <= ids[0, 0, 1:]).all()


def test_counts_per_sample_do_not_change_the_numbers() -> None:
    tokens = [[START, IMAGE, 7], [START, IMAGE, START]]
    grids = [[1, 2, 2]] * 2
    plain = rope_index(spec_of(), tokens, image_grid_thw=grids)
    counted = rope_index(
        spec_of(), tokens, image_grid_thw=grids, images_per_sample=[1, 1], videos_per_sample=[0, 0]
    )
    for one, other in zip(plain, counted, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def test_inputs_are_left_as_they_were_and_outputs_are_the_callers_own() -> None:
    tokens = np.array([[START, IMAGE, 7]])
    grid = np.array([[1, 2, 2]])
    mask = np.ones_like(tokens)
    before = [array.copy() for array in (tokens, mask, grid)]
    first, _ = rope_index(spec_of(), tokens, mask, grid)
    first += 1000
    second, _ = rope_index(spec_of(), tokens, mask, grid)
    assert second.max() < 1000
    for array, copy in zip((tokens, mask, grid), before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_read_only_inputs_of_every_integer_width_work() -> None:
    expected = rope_index(spec_of(), [[START, IMAGE, 7]], None, [[1, 2, 2]])[0]
    for dtype in (np.int16, np.int32, np.uint8, np.uint64):
        tokens = np.array([[START, IMAGE, 7]], dtype)
        tokens.setflags(write=False)
        ids, _ = rope_index(spec_of(), tokens, None, np.array([[1, 2, 2]], dtype))
        np.testing.assert_array_equal(ids, expected, strict=True)


def test_other_mask_values_are_padding_or_refused_as_the_reference_has_it() -> None:
    tokens, mask = [[7, 8]], [[2, 1]]
    assert times(rope_index(spec_of(), tokens, mask)[0]) == [0, 1]
    with pytest.raises(MRopeError, match="attention_mask must hold 0 and 1 only"):
        rope_index(spec_of(reference=OLD), tokens, mask)
