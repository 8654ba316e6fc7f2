"""A short form of `make fuzz`, what it found, and that the judge sees a fault."""

from __future__ import annotations

import random
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz import judge as judging
from fuzz.judge import EXACT, KINDS, UNDAMAGED, WrongError, judge, memory
from fuzz.run import fuzz, fuzz_responses, spec_of, table
from mrope import MRopeCollator, MRopeError, SpanMismatchError, rope_index
from mrope.collate.padding import PaddingCollator
from support.batches import ROWS

QWEN3 = spec_of(("qwen3_vl", "transformers-5.23"))
GLM = spec_of(("glm4v", "transformers-5.23"))
IMAGE, VIDEO, GLM_START, GLM_END = 102, 103, 104, 105
GOOD: dict[str, Any] = {
    "input_ids": [[101, IMAGE, 7], [101, IMAGE, 8]],
    "image_grid_thw": [[1, 2, 2]] * 2,
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(rng=st.randoms(use_true_random=False), row=st.sampled_from(ROWS))
def test_exact_or_refused(kind: str, rng: random.Random, row: tuple[str, str]) -> None:
    judge(rng, spec_of(row), kind)


@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_undamaged_batches_are_exact(row: tuple[str, str]) -> None:
    assert judge(random.Random(str(row)), spec_of(row), UNDAMAGED) == EXACT


def test_the_short_run_is_clean_and_the_same_again() -> None:
    tally = fuzz(400, seed=1)
    assert tally.faults == []
    assert tally.verdicts.total() == 400
    assert 100 < sum(n for (_, verdict), n in tally.verdicts.items() if verdict == EXACT) < 300
    assert fuzz(60, seed=2).verdicts == fuzz(60, seed=2).verdicts
    assert "| all | 400 |" in table(tally)


def test_damaged_turns_behind_prompts_are_exact_or_refused() -> None:
    tally = fuzz_responses(200, seed=1)
    assert tally.faults == []
    assert 40 < sum(n for (_, verdict), n in tally.verdicts.items() if verdict == EXACT) < 160


def test_the_judge_of_turns_sees_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of a turn without placeholders were dropped once, with the image that they were of."""
    monkeypatch.setattr("fuzz.responses.extend", lambda spec, ids, deltas, *_, **__: (ids, deltas))
    assert fuzz_responses(20, seed=1).faults


@pytest.mark.parametrize("kind", ["truncated on the right", "huge size", "stray special token"])
def test_a_damaged_batch_takes_no_more_than_twice_the_memory(kind: str) -> None:
    for row in {family: (family, reference) for family, reference in ROWS}.values():
        peak = memory(random.Random(f"{row}"), spec_of(row), kind)
        assert peak is None or peak <= 2


def _raise(error: BaseException) -> Any:
    raise error


def _other_numbers(*args: Any, **kwargs: Any) -> Any:
    position_ids, deltas = rope_index(*args, **kwargs)
    position_ids[..., -1] += 1
    return position_ids, deltas


@pytest.mark.parametrize(
    ("stand_in", "words"),
    [
        (lambda *_, **__: _raise(KeyError("x")), "KeyError"),
        (lambda *_, **__: _raise(ValueError("x")), "ValueError"),
        (_other_numbers, "positions differ"),
        (lambda *_, **__: _raise(MRopeError("x")), "an undamaged batch was refused"),
    ],
)
def test_the_judge_sees_a_fault(stand_in: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "rope_index", stand_in)
    with pytest.raises(WrongError, match=words):
        judge(random.Random(3), QWEN3, UNDAMAGED)


def test_the_judge_sees_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this test shortens the limit: a busy machine would turn other faults into a hang."""
    monkeypatch.setattr(judging, "rope_index", lambda *_, **__: time.sleep(60))
    monkeypatch.setattr(judging, "SECONDS", 0.2)
    with pytest.raises(WrongError, match=r"Hang: more than 0\.2 s"):
        judge(random.Random(3), QWEN3, UNDAMAGED)


def test_the_judge_sees_a_dropped_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    def drops_the_first(rejects: Any, collate: Any, examples: Any) -> Any:
        return {**collate(examples[1:] or examples), "dropped": 0}

    monkeypatch.setattr("mrope.collate.skip_bad.BadExampleFilter.collate", drops_the_first)
    with pytest.raises((WrongError, AssertionError)):
        judge(random.Random(1), QWEN3, UNDAMAGED)


class TestFound:
    """What the fuzz found, each once as a test of its own."""

    def test_counts_whose_sum_wraps_around(self) -> None:
        """They crashed numpy's `repeat`, and with it the worker."""
        most = 2**63 - 1
        for counts in ([most, most], [-(2**62), 2], [3, -1]):
            with pytest.raises(MRopeError, match="does not fit a batch of 2 rows and 2 grids"):
                rope_index(QWEN3, **GOOD, images_per_sample=counts)
        ids = [[7, 7]] * 3
        with pytest.raises(MRopeError, match="does not fit"):
            rope_index(QWEN3, ids, images_per_sample=[most, most, 2])

    @pytest.mark.parametrize(
        "change",
        [{"attention_mask": [[1, 1, 1], [1]]}, {"attention_mask": [[1, 1, 1], None]},
         {"image_grid_thw": [[1, 2, 2], [1, 2]]}],
    )  # fmt: skip
    @pytest.mark.parametrize(
        "row", [ROW for ROW in ROWS if ROW[1] == "transformers-5.23"], ids=" ".join
    )
    def test_ragged_lists(self, change: Any, row: tuple[str, str]) -> None:
        with pytest.raises(ValueError) as caught:
            rope_index(spec_of(row), **(GOOD | change))
        assert type(caught.value) is MRopeError

    def test_ragged_seconds(self) -> None:
        spec = spec_of(("qwen2_5_vl", "transformers-5.23"))
        with pytest.raises(MRopeError, match="second_per_grid_ts is ragged"):
            rope_index(spec, [[VIDEO]], None, None, [[1, 2, 2]], [[0.5], [0.5, 1]])

    def test_unsigned_counts_and_ids(self) -> None:
        for name in ("input_ids", "image_grid_thw", "images_per_sample"):
            given = {"images_per_sample": [1, 1], **GOOD}
            given[name] = np.array(given[name], np.uint64)
            np.testing.assert_array_equal(
                rope_index(QWEN3, **given)[0], rope_index(QWEN3, **GOOD)[0]
            )
        with pytest.raises(MRopeError, match="input_ids holds integers beyond int64"):
            rope_index(QWEN3, np.array([[2**63]], np.uint64))

    @pytest.mark.parametrize(
        "ids", [torch.tensor(7), torch.tensor([7, 8]), torch.ones(1, 2, 3).long()]
    )
    def test_ids_of_another_shape_in_the_collator(self, ids: torch.Tensor) -> None:
        batch = {"input_ids": ids, "image_grid_thw": torch.tensor([[1, 2, 2]])}
        with pytest.raises(MRopeError, match=r"input_ids must have shape \(B, S\), not"):
            MRopeCollator(lambda _: dict(batch), QWEN3)([{"image_grid_thw": [[1, 2, 2]]}])

    def test_a_frames_placeholder_of_the_wrong_kind(self) -> None:
        """GLM-V's frames stand as images; the video's own placeholder among them was taken for one."""
        frame = [101, IMAGE, 99]
        row = [GLM_START, *frame, *frame, GLM_END, 7]
        rope_index(GLM, [row], video_grid_thw=[[2, 2, 2]])
        row[5] = VIDEO
        with pytest.raises(SpanMismatchError, match="row 0, valid token 5: video placeholder 103"):
            rope_index(GLM, [row], video_grid_thw=[[2, 2, 2]])

    def test_a_clip_of_very_many_frames(self) -> None:
        """Every frame became a column, whether or not there were tokens for it."""
        ids, grids = [[101, VIDEO, 7], [101, VIDEO, 7]], [[2**16, 2, 2], [1, 2, 2]]
        tracemalloc.start()
        with pytest.raises(SpanMismatchError, match="row 0, video 1: found 0 .* needs 1"):
            rope_index(QWEN3, ids, video_grid_thw=grids, videos_per_sample=[1, 1])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100_000

    @pytest.mark.parametrize(
        ("example", "words"),
        [
            ({"input_ids": "text"}, r"row 0: input_ids must be \(n,\) or \(1, n\), not \(\)"),
            (
                {"input_ids": [[1, 2], [3]]},
                "row 0: input_ids is ragged, or holds something other than numbers",
            ),
            ({"input_ids": [7.5, 8.0]}, "row 0: input_ids must hold integers, not torch.float32"),
            ({"input_ids": [7], "image_grid_thw": [[1, 2]]}, "image_grid_thw cannot be concat"),
            ([7, 8], "row 0: the example is no mapping, but list"),
        ],
    )
    def test_examples_that_are_no_numbers(self, example: Any, words: str) -> None:
        with pytest.raises(MRopeError, match=words):
            PaddingCollator()([example, {"input_ids": [7], "image_grid_thw": [1, 2, 2]}])

    def test_seconds_of_rows_around_another(self) -> None:
        """The batch has as many as before, and the row between has one of another row's."""
        spec = spec_of(("qwen2_5_omni_thinker", "transformers-5.17"))
        assert judge(random.Random("0 6842 1"), spec, "a neighbour's sizes") == EXACT
        clip = [101, VIDEO, VIDEO, 98]
        row = {"input_ids": clip, "video_grid_thw": [[2, 2, 2]], "second_per_grid_ts": [2.0]}
        three = {
            "input_ids": [*clip, *clip, *clip],
            "video_grid_thw": [[2, 2, 2]] * 3,
            "second_per_grid_ts": [2.0],
        }
        with pytest.raises(MRopeError, match="row 0: second_per_grid_ts has 1 values, but the row"):
            MRopeCollator(None, spec)([three, row, row | {"second_per_grid_ts": [0.5, 1.0, 4.0]}])
