"""Flash attention's path in transformers gets the borders of a flattened batch, and no others."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from hf.test_packed_models import ATOL, LINEAR, collator, difference, logits_alone, mixed_examples
from mrope.collate.packing import Flatten
from mrope.hf import attach
from mrope.training.step import guarded_step
from support.flash import flash_attention
from support.models import MODEL_FAMILIES, media_of, tiny_model

FAMILIES = [family for family in MODEL_FAMILIES if family not in LINEAR]


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_the_logits_are_those_of_each_example_alone(family: str, multiple: int) -> None:
    examples = mixed_examples(family, media_of(family)[0])
    batch = collator(family, packing=Flatten(pad_to_multiple_of=multiple))(examples)
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


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_an_attached_model_does_not_sync(family: str) -> None:
    """The replacement of the kernel reads the borders back once a call; nothing else syncs."""
    batch = collator(family, packing="flatten")(mixed_examples(family, media_of(family)[0]))
    with flash_attention():
        model = attach(tiny_model(family, "flash_attention_2").train())
        sites = guarded_step(model, batch).sites
    assert [site for site in sites if not site.file.endswith("flash.py")] == []


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
