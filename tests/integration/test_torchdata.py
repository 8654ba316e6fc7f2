"""torchdata's StatefulDataLoader: a run that stops in mid-epoch goes on as if it had not."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from integration.common import (
    STEPS,
    assert_equal_losses,
    collator,
    loader,
    optimizer,
    prepared,
    rows,
)
from mrope.collate.collator import Collate
from mrope.prepare.sampler import TokenBudgetSampler

FAMILY = "qwen3_vl"
STOP = 2


def steps(model: Any, step: torch.optim.Optimizer, batches: Iterable[Any]) -> list[float]:
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        step.step()
        step.zero_grad()
        losses.append(loss.item())
    return losses


def train(model: Any, collate: Collate) -> list[float]:
    batches = loader(rows(FAMILY, count=18), collate, StatefulDataLoader)
    return steps(model, optimizer(model), batches)


def train_in_two_parts(model: Any, collate: Collate) -> list[float]:
    """Stop after two steps, and go on with a new loader that knows the first one's state alone."""
    first = loader(rows(FAMILY, count=18), collate, StatefulDataLoader)
    step = optimizer(model)
    losses = steps(model, step, itertools.islice(first, STOP))
    second = loader(rows(FAMILY, count=18), collate, StatefulDataLoader)
    second.load_state_dict(first.state_dict())
    return losses + steps(model, step, second)


def test_equal_losses() -> None:
    assert_equal_losses(train_in_two_parts, FAMILY)


def test_a_stop_changes_no_loss() -> None:
    found = [run(*prepared("on", FAMILY)) for run in (train, train_in_two_parts)]
    assert len(found[0]) == STEPS
    assert found[1] == found[0]


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype
            torch.testing.assert_close(found[name], value, rtol=0, atol=0)
        else:
            assert found[name] == value


def by_rows(collate: Collate) -> Any:
    return loader(rows(FAMILY), collate, StatefulDataLoader)


def by_tokens(collate: Collate) -> Any:
    examples = rows(FAMILY)
    lengths = [len(example["input_ids"]) for example in examples]
    sampler = TokenBudgetSampler(lengths, max_tokens=2 * max(lengths), seed=1)
    return StatefulDataLoader(examples, batch_sampler=sampler, num_workers=2, collate_fn=collate)


@pytest.mark.parametrize("stop", [1, 3])
@pytest.mark.parametrize("make,packing", [(by_rows, None), (by_tokens, "flatten")])
def test_the_rest_of_the_epoch_is_the_same(make: Any, packing: Any, stop: int) -> None:
    collate = collator(FAMILY, packing=packing)
    batches = make(collate)
    epoch = iter(batches)
    for _ in range(stop):
        next(epoch)
    state = batches.state_dict()
    rest = list(epoch)
    resumed = make(collate)
    resumed.load_state_dict(state)
    again = list(resumed)
    assert len(again) == len(rest) > 1
    for found, wanted in zip(again, rest, strict=True):
        assert_same(found, wanted)
