"""The Omni thinkers: small rows by hand, what is refused, and the collator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mrope import MRopeCollator, MRopeError, MRopeSpec, rope_index
from mrope.errors import SpanMismatchError
from mrope.spec.spec import example_config

OLD = MRopeSpec.from_config(example_config("qwen2_5_omni_thinker"), "transformers-5.23")
NEW = MRopeSpec.from_config(example_config("qwen3_omni_moe_thinker"), "transformers-5.23")
START, IMAGE, VIDEO, AUDIO, AUDIO_START, END = 101, 102, 103, 104, 105, 98
# One frame or audio token a second; 12 mel frames are 3 tokens in Qwen2.5-Omni, 2 in Qwen3-Omni.
VIDEO_WITH_AUDIO = [START, AUDIO_START, *[VIDEO] * 4, *[AUDIO] * 3, END, END]


def rows(spec: MRopeSpec, ids: list[list[int]], **inputs: Any) -> tuple[list[Any], list[Any]]:
    positions, deltas = rope_index(spec, ids, **inputs)
    return positions.transpose(1, 2, 0).tolist(), deltas.ravel().tolist()


def test_an_image_and_audio_between_texts() -> None:
    """Text goes on after the largest position; audio counts on like text."""
    ids = [7, START, IMAGE, IMAGE, IMAGE, END, AUDIO_START, *[AUDIO] * 3, END]
    (row,), delta = rows(OLD, [ids], image_grid_thw=[[1, 2, 6]], audio_seqlens=[12])
    image = [[2, 2, 2], [2, 2, 3], [2, 2, 4]]
    assert row == [[0] * 3, [1] * 3, *image, *([n] * 3 for n in range(5, 11))]
    assert delta == [0]


def test_audio_in_video_in_chunks_of_qwen2_5() -> None:
    """25 positions a second, chunks of 50: frames at 0 and 75, audio at 0 1 2.

    The second frame's first token begins chunk 1. Its second would be in chunk 1 too: 75 is below
    100. Both markers at an end share a position.
    """
    inputs = {"video_grid_thw": [[2, 2, 4]], "second_per_grid_ts": [3.0], "audio_seqlens": [12]}
    (row,), delta = rows(OLD, [[7, *VIDEO_WITH_AUDIO, 8]], use_audio_in_video=True, **inputs)
    first = [[2, 2, 2], [2, 2, 3]]
    sound = [[2] * 3, [3] * 3, [4] * 3]
    second = [[77, 2, 2], [77, 2, 3]]
    assert row == [[0] * 3, [1] * 3, [1] * 3, *first, *sound, *second, *[[78] * 3] * 2, [79] * 3]
    assert delta == [80 - 13]


def test_audio_in_video_by_time_of_qwen3() -> None:
    """Frames at 0 and 12.5 * 0.1 = 2.5, audio at 0 and 1; at equal time video comes first."""
    ids = [START, AUDIO_START, VIDEO, VIDEO, AUDIO, AUDIO, END, END, 8]
    (row,), _ = rows(
        NEW,
        [ids],
        video_grid_thw=[[2, 2, 2]],
        second_per_grid_ts=[0.1],
        audio_seqlens=[12],
        use_audio_in_video=True,
    )
    assert row[:2] == [[0] * 3, [1] * 3]
    assert row[2:6] == [[2] * 3, [2] * 3, [3] * 3, [4.5, 2, 2]]
    assert row[6:] == [[5.5] * 3, [6.5] * 3, [7.5] * 3]


def test_dtypes_and_fills_are_the_references() -> None:
    mask = [[0, 1, 1, 1, 1]]
    ids = [[0, START, IMAGE, END, 8]]
    for spec, dtype, fill in ((OLD, np.int64, 1), (NEW, np.float32, 0)):
        positions, delta = rope_index(spec, ids, mask, image_grid_thw=[[1, 2, 2]])
        assert positions.dtype == delta.dtype == dtype
        assert positions[:, 0].tolist() == [[fill, 0, 1, 2, 3]] * 3
        text, delta = rope_index(spec, [[0, 8]], [[0, 1]])
        assert text[:, 0].tolist() == [[1, 0]] * 3
        # The maximum is taken over the fill: transformers' own number of a row of one token.
        assert delta.tolist() == [[1]]


GOOD: dict[str, Any] = {
    "input_ids": [[7, START, IMAGE, IMAGE, END, 8], [7, AUDIO_START, *[AUDIO] * 3, END]],
    "image_grid_thw": [[1, 2, 4]],
    "audio_seqlens": [12],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_grid_thw": [[1, 4, 4]]}, r"row 0, image 0: found 2 .* need 4"),
        ({"image_grid_thw": [[1, 2, 2]]}, r"row 0, image 0: found 2 .* need 1"),
        ({"audio_seqlens": [16]}, r"row 1, audio 0: found 3 .* need 4"),
        ({"audio_seqlens": [12, 12]}, r"the batch has 2 audios, but tokens for 1"),
        ({"audio_seqlens": None}, r"row 1, audio 0: .* no length in the batch"),
        ({"image_grid_thw": None}, r"row 0, image 0: .* no grid in the batch"),
        ({"images_per_sample": [0, 1]}, r"row 0: tokens for 1 image, but the row carries 0"),
        ({"audio_seqlens": [1]}, r"audio_seqlens\[0\] = 1: too short"),
        ({"audio_seqlens": [10**9]}, r"audio_seqlens\[0\] needs \d+ tokens, more than the 12"),
        ({"image_grid_thw": [[1, 10**7, 2]]}, r"image_grid_thw\[0\] = .*: sizes must be"),
        ({"attention_mask": np.full((2, 6), 2)}, "must hold 0 and 1 only"),
        ({"video_grid_thw": [[1, 2, 2]]}, "videos need second_per_grid_ts"),
        (
            {"video_grid_thw": [[1, 2, 2]], "second_per_grid_ts": [float("nan")]},
            "must be finite and not negative",
        ),
        ({"use_audio_in_video": [True, False]}, "or one for each of its 0 clips"),
        ({"use_audio_in_video": [1]}, "must be one bool for the whole batch"),
        ({"input_ids": [[7, START, IMAGE, IMAGE, END, 8], [7, *[AUDIO] * 4, 8]]}, "in no span"),
        (
            {
                "input_ids": [
                    [7, START, IMAGE, IMAGE, END, IMAGE],
                    [7, AUDIO_START, *[AUDIO] * 3, 9],
                ]
            },
            "row 0, valid token 5: placeholder 102 stands in no span",
        ),
        (
            {
                "input_ids": [
                    [7, START, IMAGE, IMAGE, END, START],
                    [7, AUDIO_START, *[AUDIO] * 3, 9],
                ]
            },
            "row 0, valid token 5: behind the vision start token stands nothing",
        ),
        (
            {"input_ids": [[7, 7, 7, START, IMAGE, IMAGE], [7, AUDIO_START, *[AUDIO] * 3, 9]]},
            "row 0, image 0: found 2 .* no end marker.*truncated at max_length",
        ),
    ],
)
@pytest.mark.parametrize("spec", [OLD], ids=["qwen2_5"])
def test_what_is_refused(spec: MRopeSpec, change: dict[str, Any], message: str) -> None:
    rope_index(spec, **GOOD)
    with pytest.raises(MRopeError, match=message):
        rope_index(spec, **(GOOD | change))


@pytest.mark.parametrize("flag", [True, False])
def test_the_flag_must_fit_the_tokens(flag: bool) -> None:
    bare = [START, *[VIDEO] * 4, END]
    inputs: dict[str, Any] = {"video_grid_thw": [[2, 2, 4]], "second_per_grid_ts": [3.0]}
    if not flag:
        inputs["audio_seqlens"] = [12]
    with pytest.raises(SpanMismatchError, match=f"use_audio_in_video={flag}"):
        rope_index(OLD, [bare if flag else VIDEO_WITH_AUDIO], use_audio_in_video=flag, **inputs)


def test_another_input_is_a_mistake() -> None:
    with pytest.raises(TypeError, match="takes no target_sizes"):
        rope_index(OLD, [[7]], target_sizes=[[1, 1]])
    qwen3 = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
    with pytest.raises(TypeError, match="takes no audio_seqlens for qwen3_vl"):
        rope_index(qwen3, [[7]], audio_seqlens=[12])


def test_the_collator_hands_audio_and_seconds_on() -> None:
    """As Qwen2.5-Omni's processor names them."""

    def inner(examples: Any) -> dict[str, Any]:
        return {
            "input_ids": torch.tensor([[7, *VIDEO_WITH_AUDIO, 8]]),
            "attention_mask": torch.ones(1, 13, dtype=torch.int64),
            "video_grid_thw": torch.tensor([[2, 2, 4]]),
            "video_second_per_grid": torch.tensor([3.0]),
            "feature_attention_mask": torch.tensor([[1] * 12 + [0] * 8]),
            "use_audio_in_video": True,
        }

    batch = MRopeCollator(inner, OLD)([None])
    assert batch["position_ids"][0, 0].tolist() == [0, 1, 1, 2, 2, 2, 3, 4, 77, 77, 78, 78, 79]
    assert batch["position_ids"].dtype == batch["rope_deltas"].dtype == torch.int64
    flat = MRopeCollator(inner, OLD, packing="flatten")([None])
    assert flat["position_ids"][1:].tolist() == batch["position_ids"].tolist()
    # (audios, mel frames) is not (B, S), whatever the numbers are.
    assert flat["feature_attention_mask"].shape == (1, 20)
