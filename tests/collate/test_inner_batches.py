"""What an inner collate function of the user gives, in every form of arrays and in none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mrope import MRopeCollator, MRopeError, Shapes, VisionSpec, shard_sequence
from mrope.collate.padding import PaddingCollator
from mrope.spec.spec import example_config
from support.readers import good_row, spec_of
from support.rows import row_of
from support.specs import example_spec

LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "flattened": {"packing": "flatten"},
    "rung": {"shapes": Shapes(tokens=(64,))},
}
FORMS: dict[str, Callable[[torch.Tensor], Any]] = {
    "lists": lambda value: value.tolist(),
    "array": lambda value: value.numpy(),
    "other byte order": lambda value: value.numpy().astype(">i8"),
    "backwards": lambda value: value.numpy()[::-1].copy()[::-1],
    "uint16": lambda value: value.to(torch.uint16),
    "uint64 of numpy": lambda value: value.numpy().astype(np.uint64),
}
NOTHING: list[Any] = [None, "x", 3, {}, torch.tensor(3), [[1], [1, 2]], ["a", "b"], [[[1]]]]


def batch_of(family: str = "qwen3_vl") -> dict[str, Any]:
    rows = [row_of(family, ((2, 4), (4, 4))), row_of(family, text=5)]
    batch = PaddingCollator()(rows)
    del batch["labels"]
    return batch


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_come_in_every_form(layout: str, form: str) -> None:
    batch, spec = batch_of(), example_spec("qwen3_vl")
    names = ("input_ids", "attention_mask", "image_grid_thw")
    other = batch | {name: FORMS[form](batch[name]) for name in names}
    # The batch is what the examples are, for this inner function.
    collate = MRopeCollator(dict, spec, **LAYOUTS[layout])
    found, right = collate(other), collate(batch)
    assert torch.equal(found["position_ids"], right["position_ids"])
    assert np.array_equal(np.asarray(found["input_ids"]), right["input_ids"])
    parts = [shard_sequence(one, 0, 2)["input_ids"].long() for one in (found, right)]
    assert torch.equal(*parts)


@pytest.mark.parametrize("value", NOTHING, ids=repr)
@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "image_grid_thw"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_no_column_is_one_clear_error(layout: str, name: str, value: Any) -> None:
    batch = batch_of()
    rows = [row_of("qwen3_vl", ((2, 4), (4, 4))), row_of("qwen3_vl", text=5)]
    if value is None and name == "attention_mask":
        return  # then all tokens are valid
    for examples in (None, rows):
        collate = MRopeCollator(
            lambda _: batch | {name: value}, example_spec("qwen3_vl"), **LAYOUTS[layout]
        )
        with pytest.raises(MRopeError):
            collate(examples)


@pytest.mark.parametrize("value", [*NOTHING[1:], [float("nan")] * 2, [2.5, 2.5]], ids=repr)
def test_merge_sizes_are_integers(value: Any) -> None:
    row, spec = good_row("video_llama_3"), spec_of("video_llama_3")
    batch = PaddingCollator()([row]) | {"video_merge_sizes": value}
    with pytest.raises(MRopeError, match=r"video_merge_sizes|merge size|grids need"):
        MRopeCollator(lambda _: batch, spec)(None)


@pytest.mark.parametrize("value", NOTHING[1:], ids=repr)
def test_masks_of_audios_are_integers(value: Any) -> None:
    row, spec = good_row("qwen2_5_omni_thinker"), spec_of("qwen2_5_omni_thinker")
    batch = PaddingCollator()([row]) | {"feature_attention_mask": value}
    with pytest.raises(MRopeError):
        MRopeCollator(lambda _: batch, spec)([row])


def test_types_of_experts_have_the_shape_of_the_tokens() -> None:
    """A column less would send every later row's tokens to the experts of other tokens."""
    row = good_row("ernie4_5_vl_moe")
    types = np.zeros((2, len(row["input_ids"]) - 1), np.int64)
    batch = PaddingCollator()([row, row]) | {"moe_mm_token_type_ids": types}
    spec = spec_of("ernie4_5_vl_moe")
    vision = VisionSpec.from_config(example_config("ernie4_5_vl_moe"))
    with pytest.raises(MRopeError, match="moe_mm_token_type_ids has shape"):
        MRopeCollator(lambda _: batch, spec, vision)(None)


def test_text_for_each_token_stays_as_it_is() -> None:
    """A column of the user for each token moves with the tokens if torch can hold it."""
    batch = batch_of()
    shape = tuple(batch["input_ids"].shape)
    words = np.full(shape, "a")
    given = batch | {
        "words": words,
        "weights": np.ones(shape)[::-1],
        "objects": words.astype(object),
    }
    found = MRopeCollator(lambda _: given, example_spec("qwen3_vl"), packing="flatten")(None)
    assert found["words"] is words
    assert found["weights"].shape == found["input_ids"].shape
    assert found["objects"].shape == shape
