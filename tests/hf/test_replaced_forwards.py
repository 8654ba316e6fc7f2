"""Forwards that other libraries replaced: attach keeps them at work, or refuses them by name."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf.test_packed_models import ATOL, collator, logits_alone, mixed_examples
from mrope import MRopeError
from mrope.hf import attach, detach, explain_attention
from support.models import media_of, tiny_model
from support.steps import logits_of, make_batches

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "paddleocr_vl"]


def attention_layers(model: Any) -> list[Any]:
    """Return the attention layers of the vision tower."""
    names = {name for name, _ in model.model.visual.named_modules() if name.endswith("attn")}
    return [model.model.visual.get_submodule(name) for name in sorted(names)]


def doubled(own: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward as a trainer puts it in place of `own`, by which outputs differ."""

    def patched_forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        if isinstance(output, torch.Tensor):
            return output * 2
        if isinstance(output, tuple):
            return (output[0] * 2, *output[1:])
        output.last_hidden_state = output.last_hidden_state * 2
        if output.get("pooler_output") is not None:
            output.pooler_output = output.pooler_output * 2
        return output

    return patched_forward


def wrapped(own: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same under the name, module and signature of `own`."""
    return functools.wraps(own)(doubled(own))


@pytest.mark.parametrize("patch", [doubled, wrapped])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_replaced_on_the_class_is_refused(
    family: str, patch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    base = type(model.model)
    monkeypatch.setattr(base, "forward", patch(base.forward))
    expected = rf"{base.__name__}.forward is `patched_forward` of hf.test_replaced_forwards, not "
    with pytest.raises(MRopeError, match=expected):
        attach(model)
    with pytest.raises(MRopeError, match="takes the same batches"):
        attach(model, strict=False)
    assert not [one for one in model.modules() if "forward" in vars(one)]


@pytest.mark.parametrize("family", FAMILIES)
def test_subclasses(family: str) -> None:
    """One with a forward of its own is refused; one that inherits all is attached."""
    _, batch = make_batches(family)
    model = tiny_model(family)
    own = type(model.model)
    expected = logits_of(attach(tiny_model(family)), batch)

    def forward(self: Any, **inputs: Any) -> Any:
        return own.forward(self, **inputs)

    model.model.__class__ = type("Mine", (own,), {"forward": forward})
    with pytest.raises(MRopeError, match="Mine.forward is `forward` of hf.test_replaced_forwards"):
        attach(model)
    for module in (model.model, *attention_layers(model)):
        module.__class__ = type("Mine", (type(module),), {})
    model.model.__class__ = type("Mine", (own,), {})
    assert torch.equal(logits_of(attach(model), batch), expected)
    assert "own" not in explain_attention(model)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "glm4v"])
def test_other_methods_that_attach_would_bypass_are_refused(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    base = type(model.model)
    with monkeypatch.context() as patch:
        patch.setattr(base, "get_image_features", doubled(base.get_image_features))
        with pytest.raises(MRopeError, match="get_image_features is `patched_forward` of"):
            attach(model)
    model.model.get_video_features = doubled(model.model.get_video_features)
    with pytest.raises(MRopeError, match=r"get_video_features of this .* is `patched_forward` of"):
        attach(model)


def test_a_deepstack_method_and_a_projector_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3_vl")
    text = type(model.model.language_model)
    monkeypatch.setattr(text, "_deepstack_process", doubled(text._deepstack_process))
    with pytest.raises(MRopeError, match="Qwen3VLTextModel._deepstack_process is `patched_forw"):
        attach(model)
    model = tiny_model("paddleocr_vl")
    projector = type(model.model.projector)
    monkeypatch.setattr(projector, "forward", doubled(projector.forward))
    with pytest.raises(MRopeError, match="PaddleOCRProjector.forward is `patched_forward` of"):
        attach(model)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "glm4v"])
def test_a_forward_on_the_instance_is_refused(family: str) -> None:
    for patched in (
        doubled(tiny_model(family).model.forward),
        functools.partial(doubled(tiny_model(family).model.forward)),
        torch.nn.Identity(),
    ):
        model = tiny_model(family)
        vars(model.model)["forward"] = patched
        with pytest.raises(MRopeError, match=rf"forward of this {type(model.model).__name__} is `"):
            attach(model)


@pytest.mark.parametrize(
    "where", ["layer class", "one layer", "block class", "tower", "tower class"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_tower_keeps_its_attention(
    family: str, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, batch = make_batches(family)
    model, plain = tiny_model(family), tiny_model(family)
    untouched = logits_of(plain, batch)
    for one in (model, plain):
        tower = one.model.visual
        if "class" in where:
            block = next(
                m for m in tower.modules() if type(m).__name__.endswith(("Block", "Layer"))
            )
            parts = {"layer class": attention_layers(one)[0], "block class": block}
            patched = type(parts.get(where, tower))
            if one is model:
                monkeypatch.setattr(patched, "forward", doubled(patched.forward))
        else:
            part = tower if where == "tower" else attention_layers(one)[-1]
            part.forward = doubled(part.forward)
    expected = logits_of(plain, batch)
    assert not torch.allclose(expected, untouched)
    with caplog.at_level(logging.WARNING, "mrope"):
        attach(model)
    assert "keeps its own attention, which may sync" in caplog.text
    assert "patched_forward` of hf.test_replaced_forwards" in explain_attention(model)
    torch.testing.assert_close(logits_of(model, batch), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(logits_of(detach(model), batch), expected, rtol=0, atol=0)


def test_a_patched_linear_layer_runs_on_each_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = tiny_model("qwen3_5"), tiny_model("qwen3_5")
    layer = next(m for m in model.modules() if type(m).__name__ == "Qwen3_5GatedDeltaNet")
    monkeypatch.setattr(type(layer), "forward", doubled(type(layer).forward))
    examples = mixed_examples("qwen3_5", media_of("qwen3_5")[0])
    batch = collator("qwen3_5", packing="flatten")(examples)
    expected = logits_alone(plain, "qwen3_5", examples)
    torch.testing.assert_close(logits_of(attach(model), batch)[0], expected, rtol=0, atol=ATOL)
    detach(model)
    layer.forward = doubled(layer.forward)
    with pytest.raises(MRopeError, match="forward of this Qwen3_5GatedDeltaNet is `patched_fo"):
        attach(model)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_patched_text_attention_gets_a_mask(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may not take borders, and without them examples of one row would see each other."""
    model = attach(tiny_model(family))
    if "varlen" not in explain_attention(model).splitlines()[-1]:
        pytest.skip("needs torch 2.10 for the kernel")
    detach(model)
    attention = type(model.model.language_model.layers[0].self_attn)
    monkeypatch.setattr(attention, "forward", doubled(attention.forward))
    attach(model)
    last = explain_attention(model).splitlines()[-1]
    assert f"segments, {attention.__name__}.forward is `patched_forward` of" in last


@pytest.mark.parametrize("family", FAMILIES)
def test_patches_of_what_attach_does_not_replace(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Liger sets them: the loss on the outer class, norms on classes, MLPs on instances."""
    plain_batch, batch = make_batches(family)
    model, plain = tiny_model(family), tiny_model(family)
    layer = model.model.language_model.layers[0]
    for cls in {type(model), type(layer.input_layernorm)}:
        own = cls.forward

        def patched(self: Any, *args: Any, own: Any = own, **kwargs: Any) -> Any:
            return own(self, *args, **kwargs)

        monkeypatch.setattr(cls, "forward", patched)
    for one in (model, plain):
        mlp = one.model.language_model.layers[0].mlp
        mlp.forward = MethodType(doubled(type(mlp).forward), mlp)
    expected = logits_of(plain, plain_batch)
    torch.testing.assert_close(logits_of(attach(model), batch), expected, rtol=0, atol=2e-6)
    assert "own" not in explain_attention(model)
