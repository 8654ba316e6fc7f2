"""Heads other than `...ForConditionalGeneration` on attached base models, and the base model alone."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", "5.24")

from transformers import (
    AutoConfig,
    ColQwen2Config,
    ColQwen2ForRetrieval,
)
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from mrope import MRopeError
from mrope.guard import SyncGuard
from mrope.hf import attach, detach
from mrope.hf.attaching import base_model
from support.attachable import FAMILIES, make_model, without_labels
from support.models import model_config, tiny_model
from support.steps import MEDIA, make_batches, tensor_collator


def live_config(family: str) -> Any:
    config = dict(model_config(family))
    return AutoConfig.for_model(config.pop("model_type"), **config)


def classifier(generic: type, whole: Any, labels: int = 3) -> Any:
    """Return transformers' classifier around a new base model, as it stands around Qwen3.5's."""
    base = base_model(whole)
    own = next(one for one in type(whole).__mro__ if one.__name__.endswith("PreTrainedModel"))
    # The loss is chosen by the class's name.
    name = generic.__name__.replace("Generic", "Any")
    head: Any = type(name, (generic, own), {"__module__": own.__module__})
    config = copy.deepcopy(base.config)
    for one in (config, config.get_text_config()):
        one.num_labels, one.pad_token_id = labels, 0
    torch.manual_seed(0)
    model = head._from_config(config, attn_implementation=whole.config._attn_implementation)
    return model.eval()


def classify(model: Any, batch: Any) -> list[torch.Tensor]:
    """Return the logits of a step and the gradient of every parameter."""
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    gradients = [one.grad.clone() for one in model.parameters() if one.grad is not None]
    assert len(gradients) > 20
    return [output.logits.detach(), output.loss.detach(), *gradients]


@pytest.mark.parametrize(
    "generic", [GenericForSequenceClassification, GenericForTokenClassification]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_classifiers_of_transformers(family: str, generic: type) -> None:
    """They call their base model with the token ids by position."""
    plain, batch = without_labels(family)
    ids = plain["input_ids"]
    of_tokens = generic is GenericForTokenClassification
    plain["labels"] = batch["labels"] = ids % 3 if of_tokens else torch.arange(len(ids)) % 3
    model = classifier(generic, make_model(family))
    expected = classify(model, plain)
    attach(model)
    with SyncGuard() as guard:
        found = classify(model, batch)
    # Which token is the last one of a row, the head itself looks for on the device.
    assert guard.count == 0, guard.report()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    if family == "qwen3_5":
        torch.testing.assert_close(classify(detach(model), plain), expected, rtol=0, atol=0)


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


# Those whose tower returns one tensor of features under `pooler_output`, as ColQwen2 takes it.
EMBEDDED = [
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "glm4v",
    "glm_ocr",
    "exaone4_5",
]


def retrieval_model(family: str) -> Any:
    config = ColQwen2Config(vlm_config=live_config(family).to_dict(), embedding_dim=16)
    torch.manual_seed(0)
    model = ColQwen2ForRetrieval._from_config(config).eval()
    # Without a bias the embeddings of padding, whose token embeddings are 0, are divided by 0.
    torch.nn.init.normal_(model.embedding_proj_layer.bias)
    return model


def retrieval_batches(family: str, media: str) -> tuple[Any, Any]:
    """Return a batch as ColQwen2's processor makes it, pixels in padded rows; and of the stage."""
    plain, _ = make_batches(family, MEDIA[media])
    plain = {key: one for key, one in plain.items() if key not in ("labels", "position_ids")}
    if "pixel_values" in plain:
        parts = plain["pixel_values"].split(plain["image_grid_thw"].prod(dim=1).tolist())
        plain["pixel_values"] = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        assert len({len(part) for part in parts}) > 1
    batch = dict(tensor_collator(family, lambda _: dict(plain))(None))
    # Left to itself, the head gives its base model embeddings alone, which get 1-D positions.
    return plain | {"position_ids": batch.get("position_ids")}, batch


def embedding_step(model: Any, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    embeddings = model(**batch).embeddings
    embeddings.square().sum(dim=-1).sin().mean().backward()
    named = model.named_parameters()
    gradients = {name: one.grad.clone() for name, one in named if one.grad is not None}
    return embeddings.detach(), gradients


@pytest.mark.parametrize("media", ["images", "text"])
@pytest.mark.parametrize("family", EMBEDDED)
def test_an_embedding_model_that_runs_the_tower_itself(family: str, media: str) -> None:
    """ColQwen2 takes pixels out of padded rows by a mask, and drops what its tower could read."""
    plain, batch = retrieval_batches(family, media)
    model = retrieval_model(family)
    right, gradients = embedding_step(model, plain)
    assert torch.equal(embedding_step(model, batch)[0], right)  # the unmodified model's too
    copied = copy.deepcopy(attach(model))
    assert base_model(model) is model.vlm
    for one in (model, copied, pickle.loads(pickle.dumps(model))):
        with SyncGuard() as guard:
            found, ours = embedding_step(one, batch)
        assert guard.count == 0, guard.report()
        assert torch.equal(found, right)
        assert ours.keys() == gradients.keys()
        assert all(torch.equal(ours[name], gradients[name]) for name in ours)
    assert list(model(**batch)) == list(detach(copied)(**plain))
    assert torch.equal(embedding_step(copied, plain)[0], right)
    assert not [module for module in copied.modules() if "forward" in vars(module)]


def test_an_embedding_model_takes_flat_pixels_too() -> None:
    plain, batch = retrieval_batches("qwen2_5_vl", "images")
    model = retrieval_model("qwen2_5_vl")
    right = model(**plain).embeddings
    flat = make_batches("qwen2_5_vl", MEDIA["images"])[1]["pixel_values"]
    assert torch.equal(attach(model)(**{**batch, "pixel_values": flat}).embeddings, right)


def test_an_embedding_model_without_the_stage() -> None:
    plain, batch = retrieval_batches("qwen2_vl", "images")
    model = retrieval_model("qwen2_vl")
    right = model(**plain).embeddings
    with pytest.raises(MRopeError, match="got image pixels without image_scatter_index"):
        attach(model)(**plain)
    assert torch.equal(attach(detach(model), strict=False)(**plain).embeddings, right)
    attach(detach(model).vlm)  # the base model alone: the head is the unmodified one
    assert torch.equal(model(**batch).embeddings, right)
    attach(detach(model))
    detach(model.vlm)  # the head is left
    assert torch.equal(model(**plain).embeddings, right)


def test_an_embedding_model_under_peft() -> None:
    peft = pytest.importorskip("peft")
    plain, batch = retrieval_batches("qwen2_vl", "images")
    config = peft.LoraConfig(target_modules=["q_proj", "qkv"], init_lora_weights=False)
    torch.manual_seed(1)
    model = peft.get_peft_model(retrieval_model("qwen2_vl"), config).eval()
    right = model(**plain).embeddings
    attach(model)
    with SyncGuard() as guard:
        found = model(**batch).embeddings
    assert guard.count == 0, guard.report()
    assert torch.equal(found, right)
    assert torch.equal(detach(model)(**plain).embeddings, right)
