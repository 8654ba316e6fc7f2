"""Batches by tokens: filled first-fit, even over ranks, nothing lost, resumable."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mrope import MRopeError, TokenBudgetSampler

LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=60)


def slow_first_fit(lengths: list[int], order: list[int], budget: int) -> list[list[int]]:
    """Every batch stays open: the textbook's first-fit."""
    batches: list[list[int]] = []
    for index in order:
        for batch in batches:
            if sum(lengths[one] for one in batch) + lengths[index] <= budget:
                batch.append(index)
                break
        else:
            batches.append([index])
    return batches


@given(lengths=LENGTHS, budget=st.integers(20, 60), shuffle=st.booleans(), epoch=st.integers(0, 3))
def test_it_is_first_fit(lengths: list[int], budget: int, shuffle: bool, epoch: int) -> None:
    sampler = TokenBudgetSampler(lengths, budget, shuffle=shuffle)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    order = list(range(len(lengths)))
    if not shuffle:
        expected = slow_first_fit(lengths, order, budget)
        assert sorted(map(tuple, batches)) == sorted(map(tuple, expected))
    assert sorted(index for batch in batches for index in batch) == order
    assert max(sum(lengths[index] for index in batch) for batch in batches) <= budget


def test_few_open_batches_finish_the_oldest() -> None:
    """5 and 6 leave no room for 7: the oldest of two is finished, and 4 finds 6 only."""
    lengths = [5, 6, 7, 4]
    assert list(TokenBudgetSampler(lengths, 10, shuffle=False)) == [[2], [0, 3], [1]]
    few = TokenBudgetSampler(lengths, 10, shuffle=False, open_batches=2)
    assert list(few) == [[0], [2], [1, 3]]
    assert list(TokenBudgetSampler(lengths, 10, shuffle=False, open_batches=1)) == [[0], [1], [2], [3]]  # fmt: skip


def test_limits_besides_the_budget() -> None:
    assert list(TokenBudgetSampler([1] * 5, 10, shuffle=False, max_examples=2)) == [[0, 1], [2, 3], [4]]  # fmt: skip
    # A row of 9 or 10 tokens would be rounded up to 12: the budget is 8 in truth.
    assert list(TokenBudgetSampler([5, 4, 3], 11, shuffle=False, pad_to_multiple_of=4)) == [[0, 2], [1]]  # fmt: skip


@given(lengths=LENGTHS, ranks=st.integers(1, 5), drop_last=st.booleans())
def test_ranks_have_equally_many_batches(lengths: list[int], ranks: int, drop_last: bool) -> None:
    samplers = [
        TokenBudgetSampler(lengths, 40, num_replicas=ranks, rank=rank, drop_last=drop_last)
        for rank in range(ranks)
    ]
    plans = [list(sampler) for sampler in samplers]
    assert {len(plan) for plan in plans} == {len(samplers[0])}
    seen = sorted(index for plan in plans for batch in plan for index in batch)
    if drop_last:
        assert len(set(seen)) == len(seen)
    elif len(lengths) >= ranks:
        assert seen == list(range(len(lengths)))
    else:
        assert set(seen) == set(range(len(lengths)))


def test_the_order_changes_with_the_epoch_and_the_seed_alone() -> None:
    def plan(seed: int, epoch: int) -> list[list[int]]:
        sampler = TokenBudgetSampler(range(1, 40), 50, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert plan(0, 0) == plan(0, 0)
    assert plan(0, 0) != plan(0, 1) != plan(1, 1)


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_it_goes_on_where_its_state_was_saved(taken: int) -> None:
    def make(**options: Any) -> TokenBudgetSampler:
        return TokenBudgetSampler(range(1, 40), 50, **options)

    first = make()
    first.set_epoch(2)
    whole = list(first)
    batches = iter(first)
    for _ in range(taken):
        next(batches)
    second = pickle.loads(pickle.dumps(make()))
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    second.set_epoch(2)  # as a loop that resumes would say
    assert list(second) == whole[taken:]
    assert list(second) == whole
    second.load_state_dict(first.state_dict())
    second.set_epoch(3)
    assert len(list(second)) == len(second)
    with pytest.raises(MRopeError, match="saved with seed=0, but this sampler has 1"):
        make(seed=1).load_state_dict(first.state_dict())
    with pytest.raises(MRopeError, match="saved with lengths="):
        TokenBudgetSampler(range(2, 41), 50).load_state_dict(first.state_dict())


class Numbers(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 39

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [1, 4])
def test_a_stateful_data_loader_resumes_in_mid_epoch(workers: int, taken: int) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def make() -> Any:
        sampler = TokenBudgetSampler(range(1, 40), 90, seed=3)
        return stateful.StatefulDataLoader(Numbers(), batch_sampler=sampler, num_workers=workers)

    whole = [batch.tolist() for batch in make()]
    first = make()
    batches = iter(first)
    for _ in range(taken):
        next(batches)
    state = first.state_dict()
    second = make()
    second.load_state_dict(pickle.loads(pickle.dumps(state)))
    assert [batch.tolist() for batch in second] == whole[taken:]
    assert [batch.tolist() for batch in second] == whole


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([3, 11, 12], r"example 1 has 11 tokens: more than the budget of 10; .*\(there are 2\)"),
        ([3, 0], "example 1 has 0 tokens: must be at least 1"),
        ([1.5], r"lengths must be integers \(N,\), one for each example, not float64"),
        ([], "lengths must be integers"),
        ([[1]], r"not int64 \(1, 1\)"),
    ],
)
def test_lengths_that_cannot_be_sampled_are_named(lengths: Any, message: str) -> None:
    with pytest.raises(MRopeError, match=message):
        TokenBudgetSampler(lengths, 10)


@pytest.mark.parametrize(
    "options",
    [{"max_tokens": 0}, {"max_examples": 0}, {"open_batches": 0}, {"rank": 1}, {"num_replicas": 0}],
)
def test_other_arguments_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be at least 1|is not one of"):
        TokenBudgetSampler([1], **{"max_tokens": 4, **options})
