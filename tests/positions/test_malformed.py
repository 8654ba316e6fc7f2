"""Bad input gets one clear error that names the row, the span and both counts."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mrope import MRopeCollator, MRopeError, MRopeSpec, SpanMismatchError, rope_index
from mrope.spec.families import FAMILIES, NO_TOKEN
from mrope.spec.references import REFERENCES
from mrope.spec.spec import example_config
from support.batches import SPAN_ROWS
from support.malformed import MALFORMED, Malformed

TROUBLE_PAGE = Path(__file__).parents[2] / "docs" / "trouble.md"


def spec_of(case: Malformed) -> MRopeSpec:
    return MRopeSpec.from_config(example_config(case.family), case.reference)


@pytest.mark.parametrize("case", MALFORMED, ids=lambda case: case.name)
def test_the_error_names_row_span_and_both_counts(case: Malformed) -> None:
    with pytest.raises(SpanMismatchError) as caught:
        rope_index(spec_of(case), **case.arguments)
    error = caught.value
    assert str(error) == case.message
    facts = (error.row, error.span, error.modality, error.found, error.needed)
    assert facts == (case.row, case.span, case.modality, case.found, case.needed)
    assert error.cause is not None and error.cause in case.message
    assert isinstance(error, MRopeError) and isinstance(error, ValueError)


@pytest.mark.parametrize("case", MALFORMED, ids=lambda case: case.name)
def test_the_docs_show_the_message(case: Malformed) -> None:
    page = " ".join(TROUBLE_PAGE.read_text(encoding="utf-8").split())
    assert case.message in page
    assert " ".join(case.what.split()) in page


@pytest.mark.parametrize(("family", "reference"), SPAN_ROWS)
@pytest.mark.parametrize("case", MALFORMED[:7], ids=lambda case: case.name)
def test_no_family_or_reference_lets_it_pass(case: Malformed, family: str, reference: str) -> None:
    spec = MRopeSpec.from_config(example_config(family), reference)
    if case.modality == "video" and spec.video_token_id == NO_TOKEN:
        pytest.skip("the token means nothing to this family")
    with pytest.raises(SpanMismatchError, match=r"row 0, (image|video) \d"):
        rope_index(spec, **case.arguments)


@pytest.mark.parametrize("rows", [1, 2])
def test_grids_of_the_right_sum_with_borders_elsewhere_are_refused(rows: int) -> None:
    """Two runs of 3 tokens, in one row or in two, and grids of 2 and of 4 tokens."""
    spec = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
    tokens = np.array([7, 102, 102, 102] * 2).reshape(rows, -1)
    with pytest.raises(SpanMismatchError, match="row 0, image 1 .*found 1 placeholder.*needs 4"):
        rope_index(spec, tokens, image_grid_thw=[[1, 2, 4], [1, 4, 4]])


def test_the_error_survives_pickling_and_raising_by_its_message() -> None:
    error = SpanMismatchError("row 3, image 1: ...", row=3)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(SpanMismatchError(str(error))) == str(error)


IMAGE_ROW = {
    "input_ids": [[7, 101, 102, 102, 102, 102, 8], [7, 8, 0, 0, 0, 0, 0]],
    "image_grid_thw": [[1, 4, 4]],
}
MASK = [[1] * 7, [1, 1, 0, 0, 0, 0, 0]]
# What is wrong with a whole argument: the change, and the message that docs/trouble.md shows.
WHOLE: dict[str, tuple[dict[str, Any], str]] = {
    "inverted mask": (
        {"attention_mask": [[1 - value for value in row] for row in MASK]},
        "row 0: attention_mask is 0 at all 4 placeholder tokens. Likely cause: the mask is "
        "inverted: it must be 1 at tokens and 0 at padding, and with the opposite values tokens "
        "and grids fit.",
    ),
    "mask too long by one": (
        {"attention_mask": [[*row, 1] for row in MASK]},
        "attention_mask has shape (2, 8), but input_ids (2, 7). Likely cause: a token, such as "
        "EOS, was added to or removed from one of them, or one was shifted.",
    ),
    "mask of another length": (
        {"attention_mask": [row[:4] for row in MASK]},
        "attention_mask has shape (2, 4), but input_ids (2, 7). Likely cause: one of them was "
        "truncated or padded without the other.",
    ),
    "stacked grids": (
        {"image_grid_thw": [[[1, 4, 4]], [[1, 4, 4]]]},
        "image_grid_thw must have shape (N, 3), not (2, 1, 3). Likely cause: the grids of several "
        "rows were stacked (torch.stack, default_collate); concatenate them on dim 0.",
    ),
}


@pytest.mark.parametrize("case", WHOLE)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "glm4v", "ernie4_5_vl_moe"])
def test_wrong_arguments_as_a_whole_name_the_likely_cause(family: str, case: str) -> None:
    change, message = WHOLE[case]
    spec = MRopeSpec.from_config(example_config(family), "transformers-5.23")
    rope_index(spec, **IMAGE_ROW, attention_mask=MASK)
    with pytest.raises(MRopeError) as caught:
        rope_index(spec, **(IMAGE_ROW | change))
    assert message in str(caught.value)
    if case == "inverted mask":
        assert isinstance(caught.value, SpanMismatchError)
        assert (caught.value.row, caught.value.found, caught.value.needed) == (0, 0, 4)
    page = " ".join(TROUBLE_PAGE.read_text(encoding="utf-8").split())
    assert message in page


@pytest.mark.parametrize("family", ["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "hunyuan_vl"])
def test_an_inverted_mask_in_families_with_a_rule_of_their_own(family: str) -> None:
    spec = MRopeSpec.from_config(example_config(family), "transformers-5.23")
    image = 6 if family == "hunyuan_vl" else 4  # a newline for each line
    ids = [[7, 101, *[spec.image_token_id] * image, 8], [7, 8, *[0] * (image + 1)]]
    mask = np.array([[1] * len(ids[0]), [1, 1, *[0] * (image + 1)]])
    rope_index(spec, ids, mask, [[1, 4, 4]])
    with pytest.raises(SpanMismatchError, match="Likely cause: the mask is inverted: it must be"):
        rope_index(spec, ids, 1 - mask, [[1, 4, 4]])


def test_a_truncated_row_with_a_mask_is_still_truncated() -> None:
    spec = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
    with pytest.raises(SpanMismatchError, match="truncated at max_length"):
        rope_index(spec, [[7, 101, 102, 102, 0]], [[1, 1, 1, 1, 0]], [[1, 4, 4]])


@pytest.mark.parametrize("empty", [[], [[]], np.zeros((0, 3)), np.zeros((1, 0, 3))])
def test_empty_grids_are_no_grids(empty: Any) -> None:
    spec = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
    rope_index(spec, [[7, 8]], image_grid_thw=empty, video_grid_thw=empty)


PIXELS: dict[str, tuple[list[int], str]] = {
    "too few": (
        [12, 32],
        "row 0: pixel_values has 12 patches, but image_grid_thw [[1, 4, 4]] needs 16. Likely "
        "cause: an image or video was dropped, or its pixels cut, after the processor ran.",
    ),
    "too many": (
        [16, 36],
        "row 1: pixel_values has 36 patches, but image_grid_thw [[1, 4, 8]] needs 32. Likely "
        "cause: a grid was lost on the way, or the pixels are another sample's or another "
        "processor's.",
    ),
    "swapped": (
        [32, 16],
        "row 0: pixel_values has 32 patches, but image_grid_thw [[1, 4, 4]] needs 16. Likely "
        "cause: its pixels and those of row 1 were swapped.",
    ),
}


@pytest.mark.parametrize("case", PIXELS)
def test_pixels_that_do_not_match_are_in_the_docs(case: str) -> None:
    patches, message = PIXELS[case]
    examples = [
        {
            "input_ids": [7, 101, *[102] * (4 * width // 4), 8],
            "image_grid_thw": [[1, 4, width]],
            "pixel_values": np.zeros((count, 6), np.float32),
        }
        for width, count in zip((4, 8), patches, strict=True)
    ]
    spec = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
    with pytest.raises(SpanMismatchError) as caught:
        MRopeCollator(None, spec)(examples)
    assert str(caught.value) == message
    assert message in " ".join(TROUBLE_PAGE.read_text(encoding="utf-8").split())


GOOD: dict[str, Any] = {"input_ids": [[101, 102, 7]], "image_grid_thw": [[1, 2, 2]]}
BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"image_grid_thw": [[1, 0, 2]]}, r"image_grid_thw\[0\] = \[1, 0, 2\]: every size must be at"),
    ({"image_grid_thw": [[-1, 2, 2]]}, r"image_grid_thw\[0\] = \[-1, 2, 2\]: every size must be"),
    ({"image_grid_thw": [[1, 3, 2]]}, r"\[1, 3, 2\]: height and width .* multiples of .*_size=2"),
    ({"image_grid_thw": [[1, 2**62, 2]]}, "needs more than the 3 tokens of the whole batch"),
    ({"image_grid_thw": [1, 2, 2]}, r"image_grid_thw must have shape \(N, 3\), not \(3,\)"),
    ({"image_grid_thw": [[1, 2]]}, r"image_grid_thw must have shape \(N, 3\), not \(1, 2\)"),
    ({"image_grid_thw": [[1.0, 2.0, 2.0]]}, "image_grid_thw must hold integers, not float64"),
    ({"image_grid_thw": [[1, 2, 2], [1]]}, "image_grid_thw is ragged"),
    ({"image_grid_thw": None}, "row 0, image 0: found 1 placeholder token, but has no grid"),
    ({"video_grid_thw": [[1, 2, 2]]}, "row 0, video 0: found 0 placeholder tokens, but its grid"),
    ({"input_ids": [[101.0, 102.0, 7.0]]}, "input_ids must hold integers, not float64"),
    ({"input_ids": [101, 102, 7]}, r"input_ids must have shape \(B, S\), not \(3,\)"),
    ({"input_ids": [[101, 102], [7]]}, "input_ids is ragged"),
    ({"attention_mask": [[1, 1]]}, r"attention_mask has shape \(1, 2\), but input_ids \(1, 3\)"),
    ({"attention_mask": [[1.0, 1, 1]]}, "attention_mask must be bool or integers, not float64"),
    ({"mm_token_type_ids": [[0, 1]]}, r"mm_token_type_ids has shape \(1, 2\), but input_ids"),
    ({"mm_token_type_ids": [[0.0, 1, 0]]}, "mm_token_type_ids must hold integers, not float64"),
    ({"mm_token_type_ids": [[0, 1, 3]]}, r"says 3 \(unknown to this family\), but token id 7 is"),
    ({"images_per_sample": [2]}, r"images_per_sample = \[2\] does not fit a batch of 1 rows and 1"),
    ({"images_per_sample": [-1]}, r"images_per_sample = \[-1\] does not fit"),
    ({"images_per_sample": [1, 0]}, r"images_per_sample = \[1, 0\] does not fit a batch of 1 row"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ARGUMENTS, ids=lambda value: str(value)[:60])
def test_other_bad_input(change: dict[str, Any], message: str) -> None:
    spec = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
    rope_index(spec, **GOOD)
    with pytest.raises(MRopeError, match=message):
        rope_index(spec, **(GOOD | change))


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        ([0.5, 0.5], r"second_per_grid_ts has shape \(2,\), but the batch has 1 video"),
        ([-1.0], r"second_per_grid_ts\[0\] = -1.0: must be finite, not negative"),
        ([float("nan")], r"second_per_grid_ts\[0\] = nan: must be finite"),
        ([float("inf")], r"second_per_grid_ts\[0\] = inf: must be finite"),
        ([1e30], r"second_per_grid_ts\[0\] = 1e\+30: must be finite"),
        (np.array([0.5], np.float16), "second_per_grid_ts is float16, too coarse"),
        (torch.tensor([0.5], dtype=torch.bfloat16), "second_per_grid_ts is bfloat16, too coarse"),
        ([np.float16(0.5)], "float32, float64 or integers, not float16"),
        (["half"], "float32, float64 or integers, not <U4"),
    ],
)
@pytest.mark.parametrize("reference", REFERENCES)
def test_bad_seconds(seconds: Any, message: str, reference: str) -> None:
    spec = MRopeSpec.from_config(example_config("qwen2_5_vl"), reference)
    tokens = [[101, 103, 103]]
    with pytest.raises(MRopeError, match=message):
        rope_index(spec, tokens, video_grid_thw=[[2, 2, 2]], second_per_grid_ts=seconds)


def test_seconds_are_not_looked_at_in_families_without_timed_videos() -> None:
    spec = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
    plain = rope_index(spec, [[101, 103]], video_grid_thw=[[1, 2, 2]])[0]
    given = rope_index(spec, [[101, 103]], None, None, [[1, 2, 2]], [0.5])[0]
    np.testing.assert_array_equal(plain, given)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"second_per_grid_ts": torch.ones(1).half()}, "second_per_grid_ts is float16, too coarse"),
        ({"second_per_grid_ts": [[0.5], [0.5, 1.0]]}, "second_per_grid_ts is ragged"),
    ],
)
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "paddleocr_vl", "KeyeVL"])
def test_seconds_are_refused_by_every_reader_whatever_the_family(
    wrong: dict[str, Any], words: str, family: str
) -> None:
    """Readers of rows do not know whether a family is timed: `rope_index` took what they refused."""
    spec = MRopeSpec.from_config(example_config(family))
    row = {
        "input_ids": torch.tensor([spec.vision_start_token_id, spec.video_token_id]),
        "video_grid_thw": torch.tensor([[1, 2, 2]]),
    }
    batch = row | {"input_ids": row["input_ids"][None]}
    readers: list[Callable[[dict[str, Any]], object]] = [
        lambda seconds: rope_index(spec, **(batch | seconds)),
        lambda seconds: MRopeCollator(lambda _: batch | seconds, spec)([]),
        lambda seconds: MRopeCollator(None, spec)([row | seconds]),
    ]
    for read in readers:
        read({"second_per_grid_ts": torch.ones(1)})
        with pytest.raises(MRopeError, match=words):
            read(wrong)


@pytest.mark.parametrize(
    ("types", "words"),
    [
        ([[0, 0], [0]], "mm_token_type_ids is ragged"),
        (np.zeros((1, 3)), "mm_token_type_ids must hold integers"),
        (np.zeros((1, 2), np.int64), r"mm_token_type_ids has shape \(1, 2\)"),
    ],
)
def test_types_are_refused_by_every_reader_whatever_the_family(types: Any, words: str) -> None:
    """GLM-Image's processor writes types of its own, which its rule does not read."""
    spec = MRopeSpec.from_config(example_config("glm_image"))
    batch: dict[str, Any] = {"input_ids": torch.tensor([[7, 8, 9]]), "images_per_sample": [0]}
    with pytest.raises(MRopeError, match=words):
        rope_index(spec, **batch, mm_token_type_ids=types)
    collate = MRopeCollator(lambda _: batch | {"mm_token_type_ids": types}, spec)
    with pytest.raises(MRopeError, match=words):
        collate([])


@pytest.mark.parametrize("family", [one for one, row in FAMILIES.items() if not row.video_keys])
def test_a_token_is_no_placeholder_that_the_family_does_not_have(family: str) -> None:
    """A spec says -1 for such a placeholder; -1 in a row was a video without a grid."""
    spec = MRopeSpec.from_config(example_config(family))
    counts = {"images_per_sample": [0]} if family == "glm_image" else {}
    expected = rope_index(spec, [[7, 8, 9]], [[1, 1, 1]], **counts)
    actual = rope_index(spec, [[7, -1, 9]], [[1, 1, 1]], **counts)
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_row_never_takes_its_neighbours_grid_when_examples_carry_their_own() -> None:
    """Row 0 lost an image, row 1 has one token run more than its grids: the sums agree."""
    spec = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
    image = [101, 102, 99]
    examples = [
        {"input_ids": [7, *image, 7, 7, 7], "image_grid_thw": np.array([[1, 2, 2]] * 2)},
        {"input_ids": [7, *image, *image], "image_grid_thw": np.array([[1, 2, 2]])},
    ]
    whole = [np.array(example["input_ids"]) for example in examples]
    rope_index(spec, np.stack(whole), image_grid_thw=[[1, 2, 2]] * 3)
    with pytest.raises(SpanMismatchError, match="row 0, image 1: found 0 placeholder tokens"):
        MRopeCollator(None, spec)(examples)
