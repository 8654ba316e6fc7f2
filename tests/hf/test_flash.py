"""Flash attention's path in transformers gets the borders of a flattened batch, and no others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Literal

import pytest
import torch

pytest.importorskip("transformers")

from hf.test_linear import Operators
from hf.test_packed_models import (
    ATOL,
    LINEAR,
    PACKED,
    collator,
    difference,
    logits_alone,
    mixed_examples,
)
from mrope import MRopeCollator, VisionSpec
from mrope.collate.padding import PaddingCollator
from mrope.hf import attach, inputs
from mrope.hf.attention import has_layers
from mrope.training.step import guarded_step
from support.flash import flash_attention
from support.models import (
    MODEL_FAMILIES,
    PLAIN_FAMILIES,
    media_of,
    model_config,
    tiny_model,
    tiny_spec,
)

# Whose indexers need a mask that no release makes, or takes, under flash attention.
RUN = {*MODEL_FAMILIES, *PLAIN_FAMILIES} - {"dots3_note", "glm5_next"}
FAMILIES = [one for one in PACKED if one in RUN]
# Text models that search the positions of rows for borders where they make a mask.
PLAIN = ("hyperclovax_vision_v2", "video_llama_3")


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_those_of_each_example_alone(family: str, multiple: int) -> None:
    examples = mixed_examples(family, media_of(family)[0])
    batch = collator(family, packing="flatten", pad_to_multiple_of=multiple)(examples)
    expected = logits_alone(tiny_model(family, "sdpa"), family, examples)
    with flash_attention() as calls:
        model = tiny_model(family, "flash_attention_2")
        if family not in LINEAR:
            assert difference(model, batch, expected) < ATOL
        attach(model)
        calls.clear()
        assert difference(model, batch, expected) < ATOL
    borders = batch["cu_seq_lens_q"].tolist()
    text = [call for call in calls if call["borders"][-1] == borders[-1]]
    assert text and all(call["borders"] == borders for call in text)
    assert {call["longest"] for call in text} == {batch["max_length_q"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_attached_model_does_not_sync(family: str) -> None:
    """The replacement of the kernel reads the borders back once a call; nothing else syncs."""
    batch = collator(family, packing="flatten")(mixed_examples(family, media_of(family)[0]))
    with flash_attention():
        model = attach(tiny_model(family, "flash_attention_2").train())
        sites = guarded_step(model, batch).sites
    assert [site for site in sites if not site.file.endswith("flash.py")] == []


def padded(family: str, side: Literal["left", "right"], multiple: int = 1) -> MRopeCollator:
    vision = VisionSpec.from_config(model_config(family))
    # Padding that is not zeros: the embedding of token 0 is.
    inner = PaddingCollator(pad_token_id=7, padding_side=side, pad_to_multiple_of=multiple)
    return MRopeCollator(inner, tiny_spec(family), vision)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", [*MODEL_FAMILIES, *PLAIN])
def test_rows_padded_behind_are_not_unpadded(family: str, side: Literal["left", "right"]) -> None:
    """Unpadding asks the device; in front of its tokens padding has to go."""
    examples = mixed_examples(family, media_of(family)[0])
    batch = padded(family, side)(examples)
    expected = logits_alone(tiny_model(family, "sdpa"), family, examples)
    valid = batch["attention_mask"].bool()
    with flash_attention():
        model = attach(tiny_model(family, "flash_attention_2").train())
        with torch.no_grad():
            logits = model(**dict(batch)).logits
        sites = guarded_step(model, batch).sites
    assert (logits[valid] - expected).abs().max() < ATOL
    syncs = [site for site in sites if not site.file.endswith("flash.py")]
    indexed = has_layers(model.config.get_text_config(), "indexed_attention")
    assert bool(syncs) is (side == "left" or indexed)


@pytest.mark.parametrize("multiple", [1, 64])
@pytest.mark.parametrize("family", ["glm4v_moe", *PLAIN])
def test_no_borders_are_searched_for_in_one_row(family: str, multiple: int) -> None:
    """By its positions, which in GLM-4.5V's layers are M-RoPE's: those of an image are equal."""
    examples = mixed_examples(family, media_of(family)[0])[:1]
    batch = padded(family, "right", multiple)(examples)
    expected = logits_alone(tiny_model(family, "sdpa"), family, examples)
    with flash_attention():
        model = attach(tiny_model(family, "flash_attention_2").train())
        assert difference(model, dict(batch), expected) < ATOL
        sites = guarded_step(model, batch).sites
    assert [site for site in sites if not site.file.endswith("flash.py")] == []


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_fast_kernel_gets_no_mask_for_padding_behind(
    side: Literal["left", "right"], monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = mixed_examples("qwen3_vl", media_of("qwen3_vl")[0])
    batch = padded("qwen3_vl", side)(examples)
    expected = logits_alone(tiny_model("qwen3_vl"), "qwen3_vl", examples)
    model = attach(tiny_model("qwen3_vl"))
    monkeypatch.setattr(inputs, "can_attend", lambda tensor: True)
    with Operators() as operators, torch.no_grad():
        logits = model(**dict(batch)).logits
    assert (logits[batch["attention_mask"].bool()] - expected).abs().max() < ATOL
    masked = any("bitwise_and" in name for name in operators.count)  # of causal order and padding
    assert masked is (side == "left")


@pytest.mark.parametrize("family", ["qwen3_5", "lfm3_vl", "qwen3_vl"])
def test_a_cache_is_as_with_a_mask(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recurrent layers leave the state behind the padding, which their input is multiplied for."""
    batch = padded(family, "right")(mixed_examples(family, media_of(family)[0]))
    mask = torch.cat((batch["attention_mask"], torch.ones(len(batch["input_ids"]), 1).long()), 1)
    end = torch.full((len(mask), 1), mask.shape[1] - 1)
    if "rope_deltas" in batch:
        end = (batch["attention_mask"].sum(1, keepdim=True) + batch["rope_deltas"]).expand(3, -1, 1)
    after = {"input_ids": torch.full((len(mask), 1), 9), "attention_mask": mask}
    model = attach(tiny_model(family))
    found = []
    for is_fast in (False, True):
        monkeypatch.setattr(inputs, "can_attend", lambda tensor, fast=is_fast: fast)
        with torch.no_grad():
            cache = model(**dict(batch), use_cache=True).past_key_values
            found.append(model(**after, position_ids=end, cache=cache).logits)
    assert (found[0] - found[1]).abs().max() < ATOL


@pytest.mark.parametrize("kind", ["indexed_attention", "qwen_sparse_attention"])
def test_an_indexer_of_any_release_gets_the_mask(kind: str) -> None:
    mask = torch.tensor([[1, 1, 0]])
    for layers, kept in (("full_attention",), False), (("full_attention", kind), True):
        config = SimpleNamespace(_attn_implementation="flash_attention_2", layer_types=layers)
        batch = {"attention_mask": mask, "has_padding": True, "padded_behind": True}
        found = inputs.take_mask(batch, config, torch.zeros(1, 3, 4))
        assert (found is mask) is kept


def test_without_its_borders_the_examples_leak() -> None:
    """What the tests above would see: with 3 rows and no borders the row is one sequence."""
    examples = mixed_examples("qwen2_vl", media_of("qwen2_vl")[0])
    batch = dict(collator("qwen2_vl", packing="flatten")(examples))
    expected = logits_alone(tiny_model("qwen2_vl"), "qwen2_vl", examples)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
        del batch[name]
    batch["position_ids"] = batch["position_ids"][1:]
    with flash_attention():
        assert difference(tiny_model("qwen2_vl", "flash_attention_2"), batch, expected) > 100 * ATOL
    assert torch.is_tensor(expected)
