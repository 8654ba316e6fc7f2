"""Batches within several budgets, and of similar work: dealing, and the sampler that does it."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrope import MRopeError, Shapes, TokenBudgetSampler
from mrope.prepare.binning import first_fit, first_fit_budgets
from mrope.prepare.dealing import deal_evenly

RNG = np.random.default_rng(3)
LENGTHS = RNG.integers(20, 400, 600)
PATCHES = np.where(RNG.random(600) < 0.6, LENGTHS * RNG.integers(1, 5, 600), 0)
Batches = list[list[int]]


def work(tokens: Any, patches: Any) -> npt.NDArray[np.float64]:
    return np.asarray(tokens + 0.2 * patches + patches**2 / 1e4)


def steps(ranks: int, epoch: int = 0, **options: Any) -> list[Batches]:
    """Return the batches of all ranks, by step."""
    shares = []
    for rank in range(ranks):
        sampler = TokenBudgetSampler(LENGTHS, 2000, rank=rank, num_replicas=ranks, **options)
        sampler.set_epoch(epoch)
        shares.append(list(sampler))
    return [list(step) for step in zip(*shares, strict=True)]


def imbalance(batches: list[Batches], values: npt.NDArray[Any]) -> float:
    """Return the slowest rank's share over the mean, of all steps together."""
    of_ranks = np.array([[values[batch].sum() for batch in step] for step in batches])
    return float(of_ranks.max(axis=1).sum() / of_ranks.mean(axis=1).sum())


sizes = st.integers(1, 12).flatmap(
    lambda capacity: st.tuples(
        st.just(capacity),
        st.lists(st.tuples(st.integers(1, capacity), st.integers(0, 9)), min_size=1, max_size=60),
    )
)


@settings(deadline=None)
@given(sizes, st.integers(1, 7), st.booleans())
def test_no_batch_is_above_a_budget(
    given_sizes: tuple[int, list[tuple[int, int]]], multiple: int, dealt: bool
) -> None:
    capacity, examples = given_sizes
    sizes_KN, capacity_K = np.array(examples).T, np.array([capacity, 9])
    if dealt:
        rng, work_N = np.random.default_rng(0), work(*sizes_KN)
        batch_N = deal_evenly(sizes_KN, capacity_K, work_N, multiple, rng)
    else:
        batch_N = first_fit_budgets(sizes_KN, capacity_K)
    # Numbered without a gap: no batch is empty.
    assert sorted(set(batch_N)) == list(range(batch_N.max() + 1))
    for size_N, most in zip(sizes_KN, capacity_K, strict=True):
        assert np.bincount(batch_N, size_N).max() <= most


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=80))
def test_one_budget_is_first_fit(lengths: list[int]) -> None:
    expected = first_fit(np.array(lengths), 20)
    assert first_fit_budgets(np.array([lengths]), np.array([20])).tolist() == expected.tolist()


def test_only_the_newest_batches_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrope.prepare.binning._OPEN", 2)
    # The batch of 6 has room for the last 4, but there are three newer ones.
    found = first_fit_budgets(np.array([[6, 7, 8, 9, 9, 4]]), np.array([10]))
    assert found.tolist() == [0, 1, 2, 3, 4, 5]


def test_examples_of_more_than_half_a_batch_have_one_each() -> None:
    sizes_KN = np.full((1, 300), 6)
    rng = np.random.default_rng(0)
    batch_N = deal_evenly(sizes_KN, np.array([10]), np.ones(300), 8, rng)
    assert sorted(batch_N) == list(range(300))


# The sampler


def test_steps_have_similar_work() -> None:
    work_N = work(LENGTHS, PATCHES)
    by_tokens = steps(8)
    by_work = steps(8, patches=PATCHES, cost=work)
    assert imbalance(by_tokens, LENGTHS) < 1.02 and imbalance(by_tokens, work_N) > 1.08
    assert imbalance(by_work, work_N) < 1.02
    # Nor do steps go from large to small, or ranks.
    of_ranks = np.array([[work_N[batch].sum() for batch in step] for step in by_work])
    assert len(set(of_ranks.argmax(axis=1))) > 3
    assert np.diff(of_ranks.sum(axis=1)).min() < 0 < np.diff(of_ranks.sum(axis=1)).max()


@given(st.integers(1, 9), st.booleans(), st.booleans(), st.none() | st.integers(2, 5))
@settings(max_examples=30, deadline=None)
def test_every_example_once_within_all_budgets(
    ranks: int, shuffle: bool, drop_last: bool, max_examples: int | None
) -> None:
    options: dict[str, Any] = {"patches": PATCHES, "max_patches": 3000, "shuffle": shuffle}
    options |= {"drop_last": drop_last, "max_examples": max_examples}
    options |= {"cost": work} if shuffle else {}
    batches = [batch for step in steps(ranks, **options) for batch in step]
    for batch in batches:
        assert LENGTHS[batch].sum() <= 2000 and PATCHES[batch].sum() <= 3000
        assert len(batch) <= (max_examples or 600)
    seen = Counter(index for batch in batches for index in batch)
    assert set(seen.values()) == {1}
    assert drop_last or len(seen) == 600


def test_batches_are_full() -> None:
    batches = [batch for step in steps(4, patches=PATCHES, cost=work) for batch in step]
    assert np.mean([LENGTHS[batch].sum() for batch in batches]) > 0.96 * 2000


def test_who_shares_a_batch_is_random() -> None:
    def pairs(epoch: int) -> set[tuple[int, int]]:
        batches = [batch for step in steps(1, epoch, patches=PATCHES, cost=work) for batch in step]
        return {(a, b) for batch in batches for a in batch for b in batch if a < b}

    first, second = pairs(0), pairs(1)
    assert first == pairs(0)
    by_chance = len(first) * len(second) / (600 * 599 / 2)
    assert len(first & second) < 2.5 * by_chance


def test_order_follows_from_seed_and_epoch() -> None:
    options: dict[str, Any] = {"patches": PATCHES, "cost": work}
    orders = {
        json.dumps(steps(2, epoch, seed=seed, **options)) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_patches_without_cost_are_balanced_by_tokens() -> None:
    batches = steps(8, patches=PATCHES, max_patches=4000)
    assert imbalance(batches, LENGTHS) < 1.02
    for batch in (batch for step in batches for batch in step):
        assert PATCHES[batch].sum() <= 4000


def test_pairs_are_the_third_argument_of_cost() -> None:
    seen: list[Any] = []

    def cost(*counts: Any) -> Any:
        seen.extend(counts)
        return counts[0]

    TokenBudgetSampler([5, 6], 10, cost=cost, patches=[3, 0], patch_pairs=[9, 0])
    assert [one.tolist() for one in seen] == [[5, 6], [3, 0], [9, 0]]


def test_a_cost_may_change_its_arguments() -> None:
    def cost(tokens: Any, patches: Any) -> Any:
        tokens += 1000 * patches
        return tokens

    sampler = TokenBudgetSampler([5, 6], 10, cost=cost, patches=[3, 0])
    assert sampler.budgets["tokens"].sizes_N.tolist() == [5, 6]


# A ladder


def test_no_batch_is_above_the_top_rungs() -> None:
    shapes = Shapes(
        tokens=(500, 1000), patches=(600, 2400), tokens_per_example=200, patches_per_segment=100
    )
    segments = np.where(PATCHES > 0, 3, 0)
    for shuffle in (False, True):
        sampler = TokenBudgetSampler(
            LENGTHS, 2000, patches=PATCHES, shapes=shapes, segments=segments, shuffle=shuffle
        )
        batches = list(sampler)
        for batch in batches:
            assert LENGTHS[batch].sum() <= 1000 and PATCHES[batch].sum() <= 2400
            assert len(batch) <= 5 and segments[batch].sum() <= 24
        assert max(len(batch) for batch in batches) == 5
        assert sorted(index for batch in batches for index in batch) == list(range(600))


def test_the_lower_of_budget_and_rung_holds() -> None:
    shapes = Shapes(tokens=(64,), patches=(64,), tokens_per_example=16)
    for budget in (32, 200):
        sampler = TokenBudgetSampler([20, 20, 20], budget, patches=[0, 9, 9], shapes=shapes)
        assert max(map(len, sampler)) == min(budget, 64) // 20


# Resuming


OPTIONS: dict[str, Any] = {"patches": PATCHES, "max_patches": 4000, "cost": work}


def test_a_state_brings_the_remaining_batches() -> None:
    sampler = TokenBudgetSampler(LENGTHS, 2000, rank=1, num_replicas=2, **OPTIONS)
    sampler.set_epoch(4)
    batches = iter(sampler)
    drawn = [next(batches) for _ in range(5)]
    resumed = iter(TokenBudgetSampler(LENGTHS, 2000, rank=1, num_replicas=2, **OPTIONS))
    resumed.load_state_dict(json.loads(json.dumps(batches.state_dict())))
    assert drawn + list(resumed) == list(sampler)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"max_patches": 4001}, "saved with max_patches 4000, the sampler has 4001"),
        ({"cost": lambda tokens, patches: tokens}, "or their patches or cost"),
        ({"patches": PATCHES[::-1]}, "or their patches or cost"),
        ({"shapes": Shapes((2000,), (4000,))}, "saved with shapes None, the sampler has Shapes"),
    ],
)
def test_a_state_of_other_budgets_is_refused(change: dict[str, Any], message: str) -> None:
    state = iter(TokenBudgetSampler(LENGTHS, 2000, **OPTIONS)).state_dict()
    with pytest.raises(MRopeError, match=message):
        iter(TokenBudgetSampler(LENGTHS, 2000, **{**OPTIONS, **change})).load_state_dict(state)


def test_states_from_before_patches_are_taken() -> None:
    batches = iter(TokenBudgetSampler(LENGTHS, 2000))
    state = batches.state_dict()
    del state["max_patches"], state["shapes"]
    batches.load_state_dict(state)


# Errors


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"patches": [3, 9], "max_patches": 8},
            "example 1 has 9 patches, above the budget of max_patches=8; raise max_patches, or",
        ),
        (
            {"patches": [9, 9], "shapes": Shapes((64,), (8,))},
            r"example 0 has 9 patches, above the top rung of shapes, which has room for 8 \(the "
            r"first of 2 such examples\); add a higher rung",
        ),
        (
            {"patches": [0, 0], "shapes": Shapes((4,), (8,))},
            "example 0 has 5 tokens, above the top rung of shapes, which has room for 4",
        ),
        ({"patches": [3]}, "patches must be one for each of 2 examples, not 1"),
        ({"patches": [3, -1]}, "example 1 has -1 patches"),
        ({"patches": [3, 1.5]}, "patches must be integers of at most 64 bits"),
        ({"cost": lambda tokens, patches: tokens[:1]}, r"a number for each example, \(2,\)"),
        ({"cost": lambda tokens, patches: tokens - 6.0}, r"not -1.0 \(example 0\)"),
        ({"cost": lambda tokens, patches: tokens * np.nan}, "must be finite"),
        ({"cost": lambda tokens, patches: patches}, "cost is 0 for every example"),
    ],
)
def test_bad_columns_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MRopeError, match=message):
        TokenBudgetSampler([5, 6], 10, **{"max_patches": None, **options})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_patches": 8}, "max_patches needs patches"),
        ({"shapes": Shapes((64,), (8,))}, "shapes needs patches"),
        ({"segments": [1, 1]}, "segments needs shapes"),
        ({"patches": [1, 1], "patch_pairs": [1, 1]}, "patch_pairs needs cost"),
        ({"cost": work, "patch_pairs": [1, 1]}, "patch_pairs needs patches"),
        ({"cost": work, "shuffle": False}, "cost needs shuffle=True"),
        ({"patches": [1, 1], "max_patches": 0}, "max_patches must be at least 1, not 0"),
    ],
)
def test_an_argument_without_its_other_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenBudgetSampler([5, 6], 10, **options)
