"""Attached forwards that something has taken in: detach leaves a model that works."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import torch

accelerate = pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState

from mrope.guard import SyncGuard
from mrope.hf import attach, detach
from support.models import media_of, tiny_model
from support.steps import logits_of, make_batches

FAMILIES = ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "paddleocr_vl", "lfm3_vl"]


@pytest.fixture
def fresh_state() -> Iterator[None]:
    """accelerate keeps the precision of a process's first `Accelerator`, a `Trainer`'s too."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def in_mixed_precision(base: Any) -> None:
    """As `Accelerator.prepare` does it, here in the precision of the weights."""
    from accelerate.utils import convert_outputs_to_fp32

    own = base.forward
    base._original_forward = own
    autocast: Any = torch.autocast("cpu", enabled=False)
    base.forward = MethodType(functools.wraps(own)(autocast(own.__func__)), base)
    base.forward = functools.wraps(own)(convert_outputs_to_fp32(base.forward))


def compiled(base: Any) -> None:
    base.forward = torch.compile(base.forward, backend="eager")


def wrapped(base: Any) -> None:
    own = base.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    base.forward = forward


def in_a_partial(base: Any) -> None:
    base.forward = functools.partial(base.forward)


def twice(base: Any) -> None:
    wrapped(base)
    wrapped(base)


@pytest.mark.parametrize("wrap", [in_mixed_precision, wrapped, in_a_partial, twice])
@pytest.mark.parametrize("family", FAMILIES)
def test_detach_beneath_a_wrapper(family: str, wrap: Callable[[Any], None]) -> None:
    plain, batch = make_batches(family)
    model = tiny_model(family)
    expected = logits_of(model, plain)
    wrap(attach(model).model)
    torch.testing.assert_close(logits_of(model, batch), expected, rtol=0, atol=2e-6)
    detach(model)
    assert torch.equal(logits_of(model, plain), expected)
    # With the collator's batch too: the tower's layers are its own again.
    assert torch.equal(logits_of(model, batch), expected)


def test_detach_beneath_a_compiled_forward() -> None:
    """Without pixels, which the unmodified forward reads on the host."""
    plain, batch = make_batches("qwen3_vl", {"images": False, "videos": False})
    model = tiny_model("qwen3_vl")
    expected = logits_of(model, plain)
    compiled(attach(model).model)
    torch.testing.assert_close(logits_of(model, batch), expected, rtol=0, atol=2e-6)
    detach(model)
    torch.testing.assert_close(logits_of(model, plain), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_a_wrapper_around_a_part(family: str) -> None:
    """A trainer wraps the tower's layers, too."""
    plain, batch = make_batches(family, media_of(family)[0])
    model = tiny_model(family)
    expected = logits_of(model, plain)
    attach(model)
    for block in model.model.visual.blocks:
        wrapped(block.attn)
    assert torch.equal(logits_of(model, batch), expected)
    detach(model)
    assert torch.equal(logits_of(model, plain), expected)
    assert torch.equal(logits_of(model, batch), expected)


@pytest.mark.usefixtures("fresh_state")
def test_prepared_by_accelerate() -> None:
    plain, batch = make_batches("qwen3_vl", media_of("qwen3_vl")[0])
    for one in (plain, batch):
        del one["labels"]
    model = attach(tiny_model("qwen3_vl")).model
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    prepared(**batch)
    detach(prepared)
    expected = tiny_model("qwen3_vl").model
    with torch.autocast("cpu", torch.bfloat16):
        right = expected(**plain).last_hidden_state
    assert torch.equal(prepared(**plain).last_hidden_state, right.float())


@pytest.mark.usefixtures("fresh_state")
def test_what_accelerate_has_wrapped_and_unwrapped_is_attached() -> None:
    plain, batch = make_batches("qwen3_vl", media_of("qwen3_vl")[0])
    for one in (plain, batch):
        del one["labels"]
    right = tiny_model("qwen3_vl").model(**plain).last_hidden_state
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(attach(tiny_model("qwen3_vl")).model)
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    with SyncGuard() as guard:
        found = model(**batch).last_hidden_state
    assert torch.equal(found, right)
    assert guard.count == 0, guard.report()
    assert "forward" not in vars(detach(model))
    assert torch.equal(model(**plain).last_hidden_state, right)
