"""What the collator adds to a batch, what it leaves alone, and what it refuses."""

from __future__ import annotations

import pickle
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from mrope import MRopeCollator, MRopeError, MRopeSpec, SpanMismatchError, rope_index
from mrope.collate.padding import PaddingCollator
from mrope.spec.families import FAMILIES
from mrope.spec.spec import example_config
from mrope.towers import VisionSpec
from support.batches import random_batch

START, IMAGE, VIDEO = 101, 102, 103


def spec_of(family: str = "qwen3_vl") -> MRopeSpec:
    return MRopeSpec.from_config(example_config(family), "transformers-5.23")


class Given:
    """An inner collate function that returns a batch made beforehand."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __call__(self, examples: Any) -> Any:
        return self.batch


def collate(batch: Any, examples: Any = (), family: str = "qwen3_vl") -> Any:
    return MRopeCollator(Given(batch), spec_of(family))(examples)


def as_tensors(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in batch.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_batch_gets_what_rope_index_returns(family: str) -> None:
    rng = random.Random(family)
    for _ in range(50):
        arguments = random_batch(rng, spec_of(family))
        batch = collate(as_tensors(arguments), family=family)
        expected = rope_index(spec_of(family), **arguments)
        for name, array in zip(("position_ids", "rope_deltas"), expected, strict=True):
            assert isinstance(batch[name], torch.Tensor) and batch[name].is_contiguous()
            np.testing.assert_array_equal(batch[name].numpy(), array, strict=True)


def test_no_other_key_is_changed() -> None:
    pixels = torch.rand(4, 8)
    before = {
        "input_ids": torch.tensor([[START, IMAGE, 7]]),
        "image_grid_thw": torch.tensor([[1, 2, 2]]),
        "pixel_values": pixels,
        "ids": [17],
        "step": 3,
        "text": "a cat",
        "nothing": None,
        "use_cache": False,
    }
    kept = dict(before)
    batch = collate(before)
    assert isinstance(batch, dict)
    assert {name: batch[name] for name in kept} == kept
    assert all(batch[name] is value for name, value in kept.items())
    assert set(batch) - set(kept) == {"position_ids", "rope_deltas"}


def test_numpy_and_list_batches_work_too() -> None:
    expected = collate({"input_ids": torch.tensor([[START, IMAGE, 7]]),
                        "image_grid_thw": torch.tensor([[1, 2, 2]])})  # fmt: skip
    for kind in (np.array, list):
        batch = collate(
            {"input_ids": kind([[START, IMAGE, 7]]), "image_grid_thw": kind([[1, 2, 2]])}
        )
        assert torch.equal(batch["position_ids"], expected["position_ids"])


def test_batch_encoding_and_batch_feature_keep_their_class() -> None:
    transformers = pytest.importorskip("transformers")
    for kind in (transformers.BatchEncoding, transformers.BatchFeature):
        batch = collate(kind({"input_ids": torch.tensor([[7, 8]])}))
        assert type(batch) is kind
        assert batch["position_ids"].shape == (3, 1, 2)
        assert batch.to("cpu")["rope_deltas"].tolist() == [[0]]


@pytest.mark.parametrize("name", ["second_per_grid_ts", "video_second_per_grid"])
@pytest.mark.parametrize(
    ("value", "last"),
    [
        ([0.7], 63),
        (torch.tensor([0.7]), 63),
        (torch.tensor([0.7], dtype=torch.float64), 62),
        (np.array([0.7], np.float32), 63),
        (torch.tensor([1]), 90),
    ],
)
def test_seconds_are_multiplied_as_the_model_would_with_what_the_batch_holds(
    name: str, value: Any, last: int
) -> None:
    """Frame 45 at 1.4 positions a frame, in float32 or in float64."""
    tokens = torch.full((1, 46), VIDEO)
    grid = torch.tensor([[46, 2, 2]])
    batch = collate({"input_ids": tokens, "video_grid_thw": grid, name: value}, family="qwen2_5_vl")
    assert batch["position_ids"][0, 0, 45] == last


def test_seconds_under_both_names_must_agree() -> None:
    batch = {
        "input_ids": torch.tensor([[VIDEO]]),
        "video_grid_thw": torch.tensor([[1, 2, 2]]),
        "second_per_grid_ts": [0.5],
        "video_second_per_grid": torch.tensor([0.5]),
    }
    collate(dict(batch), family="qwen2_5_vl")
    with pytest.raises(MRopeError, match="both present and differ"):
        collate(batch | {"second_per_grid_ts": [0.25]}, family="qwen2_5_vl")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1, 2], "must return a mapping with input_ids, not list"),
        ({"tokens": 1}, r"must return a mapping with input_ids, not dict with \['tokens'\]"),
        ({"input_ids": torch.tensor([[7]]), "position_ids": 1}, "already gave position_ids"),
        ({"input_ids": torch.tensor([[7]]), "rope_deltas": 1}, "already gave rope_deltas"),
        ({"input_ids": torch.ones(1, 2)}, "input_ids must hold integers, not float32"),
        ({"input_ids": [[1, 2], [3]]}, "input_ids is ragged"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.int64, device="meta")}, "is on meta: collate"),
    ],
)
def test_batches_that_are_refused(batch: Any, message: str) -> None:
    with pytest.raises(MRopeError, match=message):
        collate(batch)


def test_half_precision_seconds_are_refused() -> None:
    batch = {
        "input_ids": torch.tensor([[VIDEO]]),
        "video_grid_thw": torch.tensor([[1, 2, 2]]),
    }
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(MRopeError, match="bfloat16|float16"):
            collate(batch | {"second_per_grid_ts": torch.ones(1, dtype=dtype)}, family="qwen2_5_vl")


def example(tokens: list[int], grids: list[list[int]]) -> dict[str, Any]:
    return {"input_ids": tokens, "image_grid_thw": np.array(grids).reshape(-1, 3)}


def test_examples_that_the_inner_function_reorders_are_matched_over_the_batch() -> None:
    two = example([START, IMAGE, START, IMAGE, 7], [[1, 2, 2]] * 2)
    examples = [two, example([START, IMAGE, IMAGE], [[1, 2, 4]])]

    class Backwards:
        def __call__(self, given: Any) -> Any:
            return PaddingCollator()(list(reversed(given)))

    batch = MRopeCollator(Backwards(), spec_of())(examples)
    assert batch["image_grid_thw"].tolist() == [[1, 2, 4], [1, 2, 2], [1, 2, 2]]
    assert batch["position_ids"][2].tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4]]


def test_counts_in_the_batch_are_used_before_those_of_the_examples() -> None:
    tokens = torch.tensor([[START, IMAGE, 7], [START, IMAGE, 7]])
    batch = {"input_ids": tokens, "image_grid_thw": torch.tensor([[1, 2, 2]] * 2)}
    collate(batch | {"images_per_sample": torch.tensor([1, 1])})
    with pytest.raises(SpanMismatchError, match="row 0, image 1: found 0"):
        collate(batch | {"images_per_sample": [2, 0]})


def test_an_example_without_images_beside_one_with_several() -> None:
    examples = [
        {"input_ids": [7, 8]},
        example([START, IMAGE, START, IMAGE], [[1, 2, 2]] * 2),
        {"input_ids": [9], "image_grid_thw": None},
    ]
    batch = MRopeCollator(None, spec_of())(examples)
    assert batch["position_ids"][0].tolist() == [[0, 1, 0, 0], [0, 1, 2, 3], [0, 0, 0, 0]]
    with pytest.raises(SpanMismatchError, match="row 0, image 0: found 1 .*has no grid"):
        MRopeCollator(None, spec_of())([{"input_ids": [IMAGE]}, example([7], [[1, 2, 2]])])


def test_arguments_of_the_constructor_are_checked() -> None:
    with pytest.raises(TypeError, match="spec must be an MRopeSpec, not dict"):
        MRopeCollator(None, {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="inner_collate must be callable, not int"):
        MRopeCollator(3, spec_of())  # type: ignore[arg-type]


def test_it_pickles_small_and_holds_plain_data() -> None:
    collator = MRopeCollator(None, spec_of())
    data = pickle.dumps(collator)
    assert len(data) < 1000
    twin = pickle.loads(data)
    assert twin.spec == collator.spec and repr(twin.inner_collate) != ""


def test_torch_keeps_its_thread_count() -> None:
    before = torch.get_num_threads(), torch.get_num_interop_threads()
    MRopeCollator(None, spec_of())([{"input_ids": [7, 8]}])
    assert (torch.get_num_threads(), torch.get_num_interop_threads()) == before


def test_vision_tensors_and_what_the_reading_model_decides_by() -> None:
    vision = VisionSpec(spatial_merge_size=2, window_side=1)
    examples = [
        example([START, IMAGE, IMAGE, 7], [[1, 2, 4]]),
        {"input_ids": [VIDEO, VIDEO], "video_grid_thw": np.array([[2, 2, 2]])},
    ]
    # Padding that looks like a placeholder is padding all the same.
    inner = PaddingCollator(pad_token_id=IMAGE)
    batch = MRopeCollator(inner, spec_of("qwen2_vl"), vision)(examples)
    assert batch["has_padding"] is True
    assert batch["image_scatter_index"].tolist() == [1, 2]
    assert batch["video_scatter_index"].tolist() == [4, 5]
    assert batch["image_split_sizes"] == [8]
    assert batch["video_split_sizes"] == [4, 4]
    assert batch["image_window_split_sizes"] == [4, 4]
    assert batch["image_cu_seqlens"].tolist() == [0, 8]
    assert batch["image_cu_seqlens"].dtype == torch.int32
    assert (batch["image_max_seqlen"], batch["video_max_seqlen"]) == (8, 4)
    assert batch["image_position_ids"].shape == (8, 2)


def test_a_text_batch_has_no_vision_tensors_but_says_whether_it_is_padded() -> None:
    collator = MRopeCollator(None, spec_of(), VisionSpec(spatial_merge_size=2, table_side=4))
    for rows, padded in (([[7, 8], [9]], True), ([[7, 8], [9, 7]], False)):
        batch = collator([{"input_ids": row} for row in rows])
        assert batch["has_padding"] is batch["padded_behind"] is padded
        added = {"position_ids", "rope_deltas", "has_padding", "padded_behind"}
        assert set(batch) == {"input_ids", "attention_mask"} | added


@pytest.mark.parametrize(
    ("mask", "behind"), [([1, 1, 0], True), ([0, 1, 1], False), ([1, 0, 1], False)]
)
def test_a_batch_says_whether_padding_is_behind_its_tokens(mask: list[int], behind: bool) -> None:
    inner = Given(
        {
            "input_ids": torch.tensor([[7, 8, 9]] * 2),
            "attention_mask": torch.tensor([mask, [1, 1, 1]]),
        }
    )
    batch = MRopeCollator(inner, spec_of(), VisionSpec(spatial_merge_size=2))([{}])
    assert batch["has_padding"] is True and batch["padded_behind"] is behind


def test_vision_tensors_of_the_inner_function_are_a_mistake_too() -> None:
    inner = Given(
        {
            "input_ids": torch.tensor([[IMAGE]]),
            "image_grid_thw": torch.tensor([[1, 2, 2]]),
            "image_cu_seqlens": torch.tensor([0, 4]),
        }
    )
    with pytest.raises(MRopeError, match="already gave image_cu_seqlens; two sources"):
        MRopeCollator(inner, spec_of(), VisionSpec(spatial_merge_size=2))([])


def test_an_old_transformers_is_refused_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrope.towers.vision_spec.installed_transformers", lambda: "5.6.0")
    with pytest.raises(MRopeError, match=r"transformers 5.6.0 does not read the vision tensors"):
        MRopeCollator(None, spec_of(), VisionSpec(spatial_merge_size=2))
    MRopeCollator(None, spec_of())


class TestPaddingCollator:
    def test_rows_are_padded_each_column_with_its_own_value(self) -> None:
        examples: list[dict[str, Any]] = [
            {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "mm_token_type_ids": [0, 1, 1]},
            {"input_ids": torch.tensor([[4]]), "labels": [4], "mm_token_type_ids": [0]},
        ]
        batch = PaddingCollator(pad_token_id=9)(examples)
        assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
        assert batch["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
        assert batch["mm_token_type_ids"].tolist() == [[0, 1, 1], [0, 0, 0]]

    def test_left_and_to_a_multiple(self) -> None:
        collator = PaddingCollator(padding_side="left", pad_to_multiple_of=4)
        batch = collator([{"input_ids": [1, 2, 3]}, {"input_ids": [4]}])
        assert batch["input_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 0, 4]]
        assert batch["attention_mask"].tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]

    def test_flat_columns_are_concatenated_and_the_rest_listed(self) -> None:
        examples: list[dict[str, Any]] = [
            {"input_ids": [1], "pixel_values": np.ones((4, 2), np.float32), "id": "a"},
            {"input_ids": [2], "id": "b"},
            {"input_ids": [3], "pixel_values": np.zeros((8, 2), np.float32), "weight": 0.5},
        ]
        batch = PaddingCollator()(examples)
        assert batch["pixel_values"].shape == (12, 2)
        assert batch["id"] == ["a", "b", None] and batch["weight"] == [None, None, 0.5]

    @pytest.mark.parametrize(
        ("examples", "message"),
        [
            ([], "cannot collate a batch without examples"),
            ([{"labels": [1]}], "row 0: the example has no input_ids"),
            ([{"input_ids": [1]}, {"input_ids": [1], "labels": [1]}], "row 0: no labels, which"),
            ([{"input_ids": [1, 2], "labels": [1]}], "row 0: 1 labels, but 2 input_ids"),
            ([{"input_ids": [[1], [2]]}], r"row 0: input_ids must be \(n,\) or \(1, n\), not"),
        ],
    )
    def test_examples_that_are_refused(self, examples: Any, message: str) -> None:
        with pytest.raises(MRopeError, match=message):
            PaddingCollator()(examples)

    def test_arguments_are_checked(self) -> None:
        with pytest.raises(ValueError, match="padding_side must be 'left' or 'right'"):
            PaddingCollator(padding_side="middle")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="pad_to_multiple_of must be at least 1"):
            PaddingCollator(pad_to_multiple_of=0)
