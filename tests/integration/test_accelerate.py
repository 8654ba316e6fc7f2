"""A plain loop under accelerate takes the collator's batches as they are."""

from __future__ import annotations

from typing import Any

import accelerate
import pytest

from integration.common import assert_equal_losses, loader, optimizer, rows
from mrope.collate.collator import Collate


def train(model: Any, collate: Collate, family: str) -> list[float]:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    batches = loader(rows(family, count=18), collate)
    model, step, batches = accelerator.prepare(model, optimizer(model), batches)
    losses = []
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            step.step()
            step.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_equal_losses(family: str) -> None:
    assert_equal_losses(lambda model, collate: train(model, collate, family), family)
