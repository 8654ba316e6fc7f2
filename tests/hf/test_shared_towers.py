"""A tower that two models hold: both read, and either can be detached."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from mrope.guard import SyncGuard
from mrope.hf import attach, detach, explain_attention
from mrope.hf.towers import vision_tower
from support.models import media_of, tiny_model
from support.steps import Batch, logits_of, make_batches

# Windows, deeper features, borders that the tower reads, and modules of two kinds behind it.
FAMILIES = ["qwen2_5_vl", "qwen3_vl", "glm4v", "paddleocr_vl", "ernie4_5_vl_moe"]
Pair = tuple[Any, Any]


def by_assignment(family: str) -> Pair:
    policy, reference = tiny_model(family, seed=0), tiny_model(family, seed=1)
    name = next(n for n, m in policy.model.named_children() if m is vision_tower(policy.model))
    setattr(reference.model, name, vision_tower(policy.model))
    return attach(policy), attach(reference)


def by_copy(family: str) -> Pair:
    policy = tiny_model(family)
    tower = vision_tower(policy.model)
    reference = copy.deepcopy(policy, {id(tower): tower})
    return attach(policy), attach(reference)


def by_copy_of_an_attached_one(family: str) -> Pair:
    policy = attach(tiny_model(family))
    tower = vision_tower(policy.model)
    return policy, copy.deepcopy(policy, {id(tower): tower})


def synced(model: Any, batch: Batch) -> int:
    with SyncGuard() as guard:
        model(**batch)
    return guard.count


@pytest.mark.parametrize("make", [by_assignment, by_copy, by_copy_of_an_attached_one])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_read_and_either_is_detached(family: str, make: Callable[[str], Pair]) -> None:
    plain, batch = make_batches(family, media_of(family)[0])
    for first in (0, 1):
        pair = make(family)
        assert vision_tower(pair[0].model) is vision_tower(pair[1].model)
        expected = [logits_of(detach(copy.deepcopy(one)), plain) for one in pair]
        assert not any("own" in explain_attention(one) for one in pair)
        for one, right in zip(pair, expected, strict=True):
            torch.testing.assert_close(logits_of(one, batch), right, rtol=0, atol=2e-6)
            assert synced(one, batch) == 0
        gone, kept = pair[first], pair[1 - first]
        detach(gone)
        assert torch.equal(logits_of(gone, plain), expected[first])
        torch.testing.assert_close(logits_of(kept, batch), expected[1 - first], rtol=0, atol=2e-6)
        assert synced(kept, batch) == 0
        detach(kept)
        assert torch.equal(logits_of(kept, plain), expected[1 - first])
        assert not [one for m in pair for one in m.modules() if "forward" in vars(one)]
        assert synced(attach(gone), batch) == 0


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "lfm3_vl"])
def test_a_tower_that_three_models_hold(family: str, order: tuple[int, ...]) -> None:
    plain, batch = make_batches(family, media_of(family)[0])
    if family == "lfm3_vl":
        for one in (plain, batch):
            del one["mm_token_type_ids"]
    models = [tiny_model(family, seed=seed) for seed in range(3)]
    tower = vision_tower(models[0].model)
    name = next(n for n, m in models[0].model.named_children() if m is tower)
    for other in models[1:]:
        setattr(other.model, name, tower)
    expected = [logits_of(model, plain) for model in models]
    for model in models:
        attach(model)
    for gone, first in enumerate(order):
        for kept in order[gone:]:
            torch.testing.assert_close(
                logits_of(models[kept], batch), expected[kept], rtol=0, atol=2e-6
            )
            assert synced(models[kept], batch) == 0
        detach(models[first])
        assert torch.equal(logits_of(models[first], plain), expected[first])
    assert not [one for model in models for one in model.modules() if "forward" in vars(one)]


def test_a_text_model_that_two_models_hold() -> None:
    _, batch = make_batches("qwen3_vl")
    policy, reference = tiny_model("qwen3_vl", seed=0), tiny_model("qwen3_vl", seed=1)
    reference.model.language_model = policy.model.language_model
    attach(policy)
    attach(reference)
    expected = logits_of(reference, batch)
    detach(policy)
    assert torch.equal(logits_of(reference, batch), expected)
    detach(reference)
    layers = [one for one in reference.modules() if "mrope_attached" in vars(one)]
    assert not layers


def test_a_model_that_is_gone_holds_nothing() -> None:
    policy, reference = tiny_model("qwen3_vl"), tiny_model("qwen3_vl", seed=1)
    reference.model.visual = policy.model.visual
    attach(policy)
    detach(attach(reference))
    del reference
    detach(policy)
    assert not [one for one in policy.modules() if "forward" in vars(one)]
