"""accelerate's hooks run around attached forwards, set before `attach` or after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

accelerate = pytest.importorskip("accelerate")

from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

from hf.test_replaced_forwards import attention_layers, doubled
from mrope import MRopeError
from mrope.hf import attach, detach, explain_attention
from support.models import tiny_model
from support.steps import logits_of, make_batches

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "paddleocr_vl"]


class Counting(ModelHook):  # type: ignore[misc]
    """Counts calls before and after a module's forward."""

    def __init__(self) -> None:
        self.before = self.after = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.before += 1
        return args, kwargs

    def post_forward(self, module: Any, output: Any) -> Any:
        self.after += 1
        return output


def hooked_parts(model: Any) -> list[Any]:
    """Return the modules to hook: those that `attach` changes, and those around them."""
    linear = [m.linear_attn for m in model.modules() if "linear_attn" in m._modules]
    base = model.model
    return [model, base, base.visual, *attention_layers(model), base.language_model, *linear]


def add_hooks(model: Any) -> list[Counting]:
    hooks = []
    for part in hooked_parts(model):
        hooks.append(Counting())
        add_hook_to_module(part, hooks[-1])
    return hooks


@pytest.mark.parametrize("order", ["hooks first", "attach first"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_run_in_either_order(family: str, order: str) -> None:
    plain_batch, batch = make_batches(family)
    expected = logits_of(attach(tiny_model(family)), batch)
    model = tiny_model(family)
    if order == "hooks first":
        hooks = add_hooks(model)
        attach(model)
    else:
        hooks = add_hooks(attach(model))
    assert "own" not in explain_attention(model)
    assert torch.equal(logits_of(model, batch), expected)
    # A tower runs twice, for images and for videos.
    assert {(hook.before, hook.after) for hook in hooks} <= {(1, 1), (2, 2)}
    counts = [hook.after for hook in hooks]
    with pytest.raises(MRopeError, match="it is attached; detach it first"):
        attach(model)

    detach(model)
    plain = logits_of(tiny_model(family), plain_batch)
    assert torch.equal(logits_of(model, plain_batch), plain)
    assert [hook.after for hook in hooks] == [2 * count for count in counts]
    attach(model)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(logits_of(model, batch), expected)
    assert torch.equal(logits_of(detach(model), plain_batch), plain)
    assert torch.equal(logits_of(attach(model), batch), expected)
    assert [hook.after for hook in hooks] == [2 * count for count in counts]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v"])
def test_hooks_that_are_chained_and_removed_on_an_attached_model(family: str) -> None:
    plain_batch, batch = make_batches(family)
    expected = logits_of(attach(tiny_model(family)), batch)
    model = attach(tiny_model(family))
    first, second = Counting(), Counting()
    add_hook_to_module(model.model, first)
    add_hook_to_module(model.model, second, append=True)
    assert torch.equal(logits_of(model, batch), expected)
    assert (first.after, second.after) == (1, 1)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(logits_of(model, batch), expected)
    plain = logits_of(tiny_model(family), plain_batch)
    assert torch.equal(logits_of(detach(model), plain_batch), plain)


# Without GLM-V: its patch embedding cannot be offloaded in the unmodified model either.
@pytest.mark.parametrize("order", ["dispatch first", "attach first"])
@pytest.mark.parametrize("offload", [False, True], ids=["dispatch_model", "cpu_offload"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_dispatched_models(family: str, offload: bool, order: str) -> None:
    """As `device_map="auto"` leaves a model; offloaded weights are loaded as each layer runs."""
    _, batch = make_batches(family)
    expected = logits_of(attach(tiny_model(family)), batch)
    model = tiny_model(family)
    if order == "attach first":
        attach(model)
    if offload:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    if order == "dispatch first":
        attach(model)
    assert torch.equal(logits_of(model, batch), expected)
    assert "own" not in explain_attention(model)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "glm4v"])
def test_a_patch_beneath_or_above_a_hook_is_refused(family: str) -> None:
    for first in ("patch", "hook"):
        model = tiny_model(family)
        if first == "patch":
            model.model.forward = doubled(model.model.forward)
        add_hook_to_module(model.model, Counting())
        if first == "hook":
            model.model.forward = doubled(model.model.forward)
        with pytest.raises(MRopeError, match=r"forward of this .* is `patched_forward` of"):
            attach(model)
