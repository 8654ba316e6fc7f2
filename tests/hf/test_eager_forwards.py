"""Attached HunYuan V4 VL, whose text model runs under eager attention alone: the same step, no sync."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers.models.hy_v4_vl")

from hf.test_forwards import assert_same_step, step, tensor_collator
from mrope.collate.padding import PaddingCollator
from mrope.hf import attach, detach
from mrope.training.step import guarded_step
from support.models import EAGER_FAMILIES, tiny_examples, tiny_model

MEDIA = {
    "images": {"images": True, "videos": False},
    "videos": {"images": False, "videos": True},
    "both": {"images": True, "videos": True},
    "text": {"images": False, "videos": False},
}


def make_batches(family: str, media: str, padded: bool) -> tuple[Any, Any]:
    examples = tiny_examples(family, **MEDIA[media])
    examples = examples if padded else [examples[0]] * 2
    inner = PaddingCollator(padding_side="left")
    plain, batch = inner(examples), tensor_collator(family, inner)(examples)
    if media == "text":
        # Left to itself, transformers 5 numbers such a batch without looking at the mask.
        plain["position_ids"] = batch["position_ids"]
    return plain, batch


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("media", MEDIA)
@pytest.mark.parametrize("family", EAGER_FAMILIES)
def test_the_same_step_without_a_sync(family: str, media: str, padded: bool) -> None:
    """Frames of equal size are multiplied in one batch under eager attention, and round so."""
    plain, batch = make_batches(family, media, padded)
    model = tiny_model(family, "eager").train()
    theirs = step(model, plain)
    assert_same_step(step(model, batch), theirs)  # the unmodified model takes the batch too
    attach(model)
    assert_same_step(step(model, batch), theirs, 2e-6)
    guard = guarded_step(model, batch)
    assert guard.count == 0, guard.report()
    detach(model)
    assert_same_step(step(model, plain), theirs)
