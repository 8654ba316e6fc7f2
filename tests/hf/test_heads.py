"""Heads other than `...ForConditionalGeneration` on attached base models, and the base model alone."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", "5.24")

from transformers import (
    AutoConfig,
    ColQwen2Config,
    ColQwen2ForRetrieval,
    Qwen3_5ForSequenceClassification,
    Qwen3_5ForTokenClassification,
)

from mrope.guard import SyncGuard
from mrope.hf import attach, detach
from mrope.hf.attaching import base_model
from support.attachable import FAMILIES, make_model, without_labels
from support.models import model_config, tiny_model


def live_config(family: str) -> Any:
    config = dict(model_config(family))
    return AutoConfig.for_model(config.pop("model_type"), **config)


@pytest.mark.parametrize("head", [Qwen3_5ForSequenceClassification, Qwen3_5ForTokenClassification])
def test_classifiers_of_transformers(head: Any) -> None:
    """They call their base model with the token ids by position."""
    plain, batch = without_labels("qwen3_5")
    config = live_config("qwen3_5")
    config.num_labels = config.text_config.num_labels = 2
    torch.manual_seed(0)
    model = head._from_config(config).eval()
    expected = model(**plain).logits
    attach(model)
    with SyncGuard() as guard:
        logits = model(**batch).logits
    assert torch.equal(logits, expected)
    # Which token is the last one of a row, the head itself looks for on the device.
    assert guard.count == 0, guard.report()
    assert torch.equal(detach(model)(**plain).logits, expected)


class ValueHead(torch.nn.Module):
    """A head as trainers of rewards write it, which gives its base model all it can by position."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.backbone = base
        self.value = torch.nn.Linear(base.config.text_config.hidden_size, 1)

    def forward(self, **inputs: Any) -> torch.Tensor:
        taken = inspect.signature(self.backbone.forward).parameters.values()
        names = [one.name for one in taken if one.kind is one.POSITIONAL_OR_KEYWORD]
        given = [inputs.pop(name, None) for name in names]
        # Some defaults are no None.
        while given and given[-1] is None:
            given.pop()
        values: torch.Tensor = self.value(self.backbone(*given, **inputs)[0])
        return values


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_model_alone_with_arguments_by_position(family: str) -> None:
    plain, batch = without_labels(family)
    model = ValueHead(make_model(family).model)
    expected = model(**plain)
    torch.testing.assert_close(attach(model)(**batch), expected, rtol=0, atol=2e-6)
    assert torch.equal(detach(model)(**plain), expected)


@pytest.mark.parametrize("family", ["qwen3_vl", "lfm3_vl", "glm_image"])
def test_the_signature_is_that_of_the_forward_that_is_replaced(family: str) -> None:
    model = tiny_model(family).model
    own = inspect.signature(model.forward)
    for one in (attach(model), copy.deepcopy(model)):
        assert inspect.signature(one.forward) == own
    with pytest.raises(
        TypeError, match=f"forward takes {len(own.parameters) - 1} arguments, not 40"
    ):
        model(*[None] * 40)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_replaced_forward_has_the_signature_of_its_own(family: str) -> None:
    model = make_model(family)
    own = {module: inspect.signature(module.forward) for module in model.modules()}
    attach(model)
    for module, signature in own.items():
        if "forward" in vars(module):
            assert names_by_position(inspect.signature(module.forward), signature), type(module)


def names_by_position(ours: inspect.Signature, own: inspect.Signature) -> bool:
    """Whether arguments that the own forward takes by position have the same names in ours."""
    pairs = zip(own.parameters.values(), ours.parameters.values(), strict=False)
    return all(
        one.name == other.name for one, other in pairs if one.kind is one.POSITIONAL_OR_KEYWORD
    )


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_an_embedding_model(family: str) -> None:
    """ColQwen2 runs the tower itself, and gives its base model embeddings: nothing changes."""
    config = ColQwen2Config(vlm_config=live_config(family).to_dict(), embedding_dim=16)
    torch.manual_seed(0)
    model = ColQwen2ForRetrieval._from_config(config).eval()
    ids = torch.randint(20, 300, (2, 9))
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    vlm = config.vlm_config
    picture = torch.cat([ids, torch.full((2, 4), vlm.image_token_id), ids], dim=1)
    size = 3 * vlm.vision_config.temporal_patch_size * vlm.vision_config.patch_size**2
    images = {
        "input_ids": picture,
        "attention_mask": torch.ones_like(picture),
        # Rows of patches are padded to one length, as its processor does.
        "pixel_values": torch.randn(2, 16, size),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
    }
    expected = [model(**one).embeddings for one in (text, images)]
    assert base_model(attach(model)) is model.vlm
    for one, right in zip((text, images), expected, strict=True):
        assert torch.equal(model(**one).embeddings, right)
        assert torch.equal(detach(copy.deepcopy(model))(**one).embeddings, right)
