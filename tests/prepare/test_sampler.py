"""The token budget sampler: budget, order, even shares of ranks, resuming, errors."""

from __future__ import annotations

import json
import pickle
import time
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mrope import MRopeError
from mrope.prepare.binning import first_fit
from mrope.prepare.sampler import TokenBudgetSampler

LENGTHS = np.random.default_rng(7).integers(1, 200, 500)
Batches = list[list[int]]


def slow_first_fit(lengths: list[int], capacity: int, max_examples: int | None) -> list[int]:
    """First-fit as anyone would write it: look at every batch, from the first one on."""
    batches: list[list[int]] = []
    places = []
    for length in lengths:
        number = 0
        while number < len(batches) and (
            sum(batches[number]) + length > capacity or len(batches[number]) == max_examples
        ):
            number += 1
        if number == len(batches):
            batches.append([])
        batches[number].append(length)
        places.append(number)
    return places


def all_ranks(lengths: Any, max_tokens: int, ranks: int, epoch: int = 0, **options: Any) -> Batches:
    """Return the batches of all ranks, step by step."""
    shares = []
    for rank in range(ranks):
        sampler = TokenBudgetSampler(lengths, max_tokens, rank=rank, num_replicas=ranks, **options)
        sampler.set_epoch(epoch)
        shares.append(list(sampler))
        assert len(sampler) == len(shares[-1])
    assert len({len(share) for share in shares}) == 1
    return [batch for step in zip(*shares, strict=True) for batch in step]


# How batches are filled


def test_first_batch_with_room_takes_the_example() -> None:
    sampler = TokenBudgetSampler([6, 5, 3, 4, 2, 1, 10], 10, shuffle=False)
    assert list(sampler) == [[0, 2, 5], [1, 3], [4], [6]]


def test_max_examples_closes_a_batch() -> None:
    sampler = TokenBudgetSampler([1, 1, 1, 1, 1], 10, max_examples=2, shuffle=False)
    assert list(sampler) == [[0, 1], [2, 3], [4]]


def test_budget_holds_after_rounding_up() -> None:
    # 5 + 4 tokens fit into 11, but are rounded up to 12.
    sampler = TokenBudgetSampler([5, 4, 3], 11, pad_to_multiple_of=4, shuffle=False)
    assert list(sampler) == [[0, 2], [1]]
    sampler = TokenBudgetSampler([5, 4, 3], 12, pad_to_multiple_of=4, shuffle=False)
    assert list(sampler) == [[0, 1, 2]]


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=60),
    st.integers(20, 60),
    st.none() | st.integers(1, 5),
)
def test_tree_equals_the_slow_twin(
    lengths: list[int], capacity: int, max_examples: int | None
) -> None:
    fast = first_fit(np.array(lengths), capacity, max_examples)
    assert fast.tolist() == slow_first_fit(lengths, capacity, max_examples)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=40),
    st.integers(32, 90),
    st.integers(1, 8),
    st.none() | st.integers(1, 5),
)
def test_no_batch_is_above_the_budget(
    lengths: list[int], max_tokens: int, multiple: int, max_examples: int | None
) -> None:
    multiple = min(multiple, max_tokens - 30)
    sampler = TokenBudgetSampler(
        lengths, max_tokens, pad_to_multiple_of=multiple, max_examples=max_examples
    )
    batches = list(sampler)
    for batch in batches:
        tokens = sum(lengths[index] for index in batch)
        assert 0 < -(-tokens // multiple) * multiple <= max_tokens
        assert max_examples is None or len(batch) <= max_examples
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))


def test_many_lengths_take_seconds() -> None:
    lengths = np.random.default_rng(0).integers(1, 4097, 250_000)
    begin = time.process_time()
    batch_N = first_fit(lengths, 4096)
    # About 0.5 s; batches number 125,000, so that a look at each would take an hour.
    assert time.process_time() - begin < 15
    assert np.bincount(batch_N, lengths).max() <= 4096


# Order


def test_order_follows_from_seed_and_epoch() -> None:
    orders = {
        (seed, epoch): json.dumps(all_ranks(LENGTHS, 999, 1, epoch, seed=seed))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    assert json.dumps(all_ranks(LENGTHS, 999, 1, 1, seed=1)) == orders[1, 1]


def test_a_second_pass_without_set_epoch_is_the_first_again() -> None:
    sampler = TokenBudgetSampler(LENGTHS, 999)
    assert list(sampler) == list(sampler)


def test_without_shuffle_epochs_are_alike_and_batches_in_order() -> None:
    batches = all_ranks(LENGTHS, 999, 1, 0, shuffle=False)
    assert batches == all_ranks(LENGTHS, 999, 1, 1, shuffle=False, seed=3)
    first = [batch[0] for batch in batches]
    assert first == sorted(first)


def test_batches_hold_short_and_long_examples() -> None:
    lengths = np.arange(1, 2001)
    spread = [np.ptp(lengths[batch]) for batch in TokenBudgetSampler(lengths, 8000)]
    # Sorted by length, neighbours would share a batch, and the spread would be about 8.
    assert np.median(spread) > 500


def test_lengths_are_copied() -> None:
    lengths = LENGTHS.copy()
    sampler = TokenBudgetSampler(lengths, 999)
    lengths[:] = 999
    assert list(sampler) == list(TokenBudgetSampler(LENGTHS, 999))


# Ranks


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=60),
    st.integers(20, 60),
    st.integers(1, 9),
    st.booleans(),
)
def test_ranks_share_every_example_once(
    lengths: list[int], max_tokens: int, ranks: int, shuffle: bool
) -> None:
    batches = all_ranks(lengths, max_tokens, ranks, shuffle=shuffle)
    seen = Counter(index for batch in batches for index in batch)
    assert sorted(seen) == list(range(len(lengths)))
    filled = len(all_ranks(lengths, max_tokens, 1, shuffle=shuffle))
    assert len(batches) == -(-filled // ranks) * ranks
    # Repeats are what is missing when no batch can be cut any more, and nothing else.
    assert seen.total() - len(lengths) == max(0, len(batches) - len(lengths))


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=60),
    st.integers(1, 9),
    st.booleans(),
)
def test_drop_last_drops_the_surplus_only(lengths: list[int], ranks: int, shuffle: bool) -> None:
    whole = all_ranks(lengths, 20, 1, shuffle=shuffle)
    if len(whole) < ranks:
        with pytest.raises(MRopeError, match="drop_last=True leaves no batch"):
            all_ranks(lengths, 20, ranks, shuffle=shuffle, drop_last=True)
        return
    kept = all_ranks(lengths, 20, ranks, shuffle=shuffle, drop_last=True)
    assert len(kept) == len(whole) // ranks * ranks
    tokens = Counter(sum(lengths[index] for index in batch) for batch in whole)
    tokens.subtract(sum(lengths[index] for index in batch) for batch in kept)
    dropped = list(tokens.elements())
    assert len(dropped) == len(whole) % ranks
    fewest = min(sum(lengths[index] for index in batch) for batch in kept)
    assert all(one <= fewest for one in dropped)


def test_largest_batch_is_cut_in_the_middle() -> None:
    # Batches of one rank: [0, 1, 2] with 10 tokens, and [3], [4] with one example each.
    lengths = [2, 3, 5, 9, 8]
    assert all_ranks(lengths, 10, 1, shuffle=False) == [[0, 1, 2], [3], [4]]
    assert all_ranks(lengths, 10, 2, shuffle=False) == [[0, 1], [2], [3], [4]]
    assert all_ranks(lengths, 10, 5, shuffle=False) == [[0], [1], [2], [3], [4]]


def test_examples_are_repeated_only_when_nothing_is_left_to_cut() -> None:
    assert Counter(map(tuple, all_ranks([9, 8, 7], 10, 2, shuffle=False))) == Counter(
        [(0,), (0,), (1,), (2,)]
    )
    assert all_ranks([4], 10, 3, shuffle=False) == [[0], [0], [0]]


def test_drop_last_drops_the_batch_of_fewest_tokens() -> None:
    lengths = [9, 4, 8]
    assert all_ranks(lengths, 10, 2, shuffle=False, drop_last=True) == [[0], [2]]
    assert all_ranks(lengths, 10, 1, shuffle=False, drop_last=True) == [[0], [1], [2]]


def test_steps_are_balanced_and_no_rank_is_favoured() -> None:
    # At most 4 examples make batches of very different sizes.
    batches = all_ranks(LENGTHS, 999, 4, max_examples=4)
    tokens_SR = np.array([LENGTHS[batch].sum() for batch in batches]).reshape(-1, 4)
    uneven = (tokens_SR.max(1) / tokens_SR.mean(1)).mean()
    shuffled = np.random.default_rng(0).permutation(tokens_SR.ravel()).reshape(-1, 4)
    assert uneven < 1.05 < (shuffled.max(1) / shuffled.mean(1)).mean()
    # Nor do steps go from large to small.
    assert set(tokens_SR.argmax(1)) == {0, 1, 2, 3}
    assert np.diff(tokens_SR.sum(1)).min() < 0 < np.diff(tokens_SR.sum(1)).max()


def test_rank_and_size_come_from_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    assert list(TokenBudgetSampler(LENGTHS, 999)) == list(
        TokenBudgetSampler(LENGTHS, 999, rank=2, num_replicas=3)
    )


# Loaders and resuming


def as_is(batch: list[int]) -> list[int]:
    return batch


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_loader_takes_it(workers: int) -> None:
    sampler = TokenBudgetSampler(LENGTHS, 999, rank=1, num_replicas=3)
    loader: Any = DataLoader(
        range(500),  # type: ignore[arg-type]
        batch_sampler=sampler,
        collate_fn=as_is,
        num_workers=workers,
    )
    assert list(loader) == list(sampler)
    assert len(loader) == len(sampler)


def test_pickles_in_the_middle_of_an_epoch() -> None:
    sampler = TokenBudgetSampler(LENGTHS, 999, seed=3)
    sampler.set_epoch(2)
    batches = iter(sampler)
    next(batches)
    copy = pickle.loads(pickle.dumps(batches))
    assert list(copy) == list(batches)
    assert list(pickle.loads(pickle.dumps(sampler))) == list(sampler)


@pytest.mark.parametrize("drawn", [0, 1, 5])
def test_state_of_an_iterator_brings_the_remaining_batches(drawn: int) -> None:
    sampler = TokenBudgetSampler(LENGTHS, 999, rank=0, num_replicas=2)
    sampler.set_epoch(3)
    batches = iter(sampler)
    for _ in range(drawn):
        next(batches)
    state = json.loads(json.dumps(batches.state_dict()))
    assert (state["epoch"], state["yielded"]) == (3, drawn)
    # The state of rank 0 serves rank 1 too: it is of the plan, which they share.
    for rank in (0, 1):
        other = TokenBudgetSampler(LENGTHS, 999, rank=rank, num_replicas=2)
        resumed = iter(other)
        resumed.load_state_dict(state)
        other.set_epoch(3)
        assert list(resumed) == list(other)[drawn:]
        assert resumed.state_dict() == {**state, "yielded": len(other)}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 1}, "saved with seed 0, the sampler has 1"),
        ({"max_tokens": 800}, "saved with max_tokens 999, the sampler has 800"),
        ({"max_examples": 9}, "saved with max_examples None, the sampler has 9"),
        ({"pad_to_multiple_of": 8}, "saved with pad_to_multiple_of 1, the sampler has 8"),
        ({"shuffle": False}, "saved with shuffle True, the sampler has False"),
        ({"drop_last": True}, "saved with drop_last False, the sampler has True"),
        ({"lengths": LENGTHS[:-1]}, "saved with examples 500, the sampler has 499"),
        ({"lengths": LENGTHS[::-1]}, "lengths of some examples, or their order, changed"),
    ],
)
def test_state_of_another_sampler_is_refused(change: dict[str, Any], message: str) -> None:
    options = {"lengths": LENGTHS, "max_tokens": 999, "rank": 0, "num_replicas": 2}
    state = iter(TokenBudgetSampler(**options)).state_dict()  # type: ignore[arg-type]
    resumed = iter(TokenBudgetSampler(**{**options, **change}))
    with pytest.raises(MRopeError, match=message):
        resumed.load_state_dict(state)


def test_state_of_other_lengths_is_refused_where_batches_are_the_same() -> None:
    state = iter(TokenBudgetSampler([6, 5], 10, shuffle=False)).state_dict()
    other = TokenBudgetSampler([6, 7], 10, shuffle=False)
    with pytest.raises(MRopeError, match="the lengths of some examples, or their order, changed"):
        iter(other).load_state_dict(state)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"yielded": -1}, "cannot resume after batch -1"),
        ({"yielded": 10**6}, "cannot resume after batch 1000000 of an epoch of"),
        ({"yielded": None}, "not a state of TokenBudgetSampler: it has no yielded"),
        ({"epoch": None}, "not a state of TokenBudgetSampler: it has no epoch"),
        ({"digest": None}, "not a state of TokenBudgetSampler: it has no digest"),
        ({"num_replicas": 0}, "epoch, num_replicas and earlier are 0, 0 and"),
        ({"epoch": "1"}, "epoch, num_replicas and earlier are '1', 1 and"),
    ],
)
def test_broken_state_is_refused(change: dict[str, Any], message: str) -> None:
    batches = iter(TokenBudgetSampler(LENGTHS, 999))
    changed = {**batches.state_dict(), **change}
    state = {key: value for key, value in changed.items() if key not in change or value is not None}
    with pytest.raises(MRopeError, match=message):
        batches.load_state_dict(state)


def stateful(workers: int, every: int = 1, **options: Any) -> tuple[TokenBudgetSampler, Any]:
    module = pytest.importorskip("torchdata.stateful_dataloader")
    sampler = TokenBudgetSampler(LENGTHS, 999, rank=1, num_replicas=2, **options)
    loader = module.StatefulDataLoader(
        range(500),
        batch_sampler=sampler,
        collate_fn=as_is,
        num_workers=workers,
        snapshot_every_n_steps=every,
    )
    return sampler, loader


@pytest.mark.parametrize("workers, every, drawn", [(0, 1, 0), (0, 1, 3), (2, 1, 3), (2, 4, 10)])
def test_stateful_loader_resumes_in_mid_epoch(workers: int, every: int, drawn: int) -> None:
    sampler, loader = stateful(workers, every)
    sampler.set_epoch(2)
    expected = list(sampler)
    sampler.set_epoch(3)
    following = list(sampler)
    sampler.set_epoch(2)
    batches = iter(loader)
    assert [next(batches) for _ in range(drawn)] == expected[:drawn]
    state = loader.state_dict()

    sampler, loader = stateful(workers, every)
    loader.load_state_dict(pickle.loads(pickle.dumps(state)))
    sampler.set_epoch(2)
    assert list(loader) == expected[drawn:]
    sampler.set_epoch(3)
    assert list(loader) == following


@pytest.mark.parametrize("workers, every", [(0, 1), (2, 4)])
def test_stateful_loader_goes_on_after_a_whole_epoch(workers: int, every: int) -> None:
    sampler, loader = stateful(workers, every)
    list(loader)
    state = loader.state_dict()

    sampler, loader = stateful(workers, every)
    loader.load_state_dict(state)
    sampler.set_epoch(1)
    assert list(loader) == list(sampler)


def test_stateful_loader_takes_the_epoch_of_the_state() -> None:
    sampler, loader = stateful(0)
    sampler.set_epoch(5)
    expected = list(sampler)
    next(iter(loader))
    state = loader.state_dict()

    sampler, loader = stateful(0)
    loader.load_state_dict(state)
    assert list(loader) == expected[1:]


@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_loader_refuses_the_state_of_another_sampler(workers: int) -> None:
    _, loader = stateful(workers)
    next(iter(loader))
    state = loader.state_dict()
    _, loader = stateful(workers, seed=1)
    loader.load_state_dict(state)
    with pytest.raises(MRopeError, match="saved with seed 0, the sampler has 1"):
        iter(loader)


def test_accelerate_may_not_shard_batches_again() -> None:
    accelerate = pytest.importorskip("accelerate.data_loader")
    sampler = TokenBudgetSampler(LENGTHS, 999, rank=1, num_replicas=2)
    loader: Any = DataLoader(range(500), batch_sampler=sampler)  # type: ignore[arg-type]
    with pytest.raises(MRopeError, match="sharded its batches over 2 ranks"):
        accelerate.prepare_data_loader(loader, num_processes=2, process_index=1)
    ready = accelerate.prepare_data_loader(loader, num_processes=1, process_index=0)
    ready.set_epoch(4)
    batches = [batch.tolist() for batch in ready]
    assert sampler.epoch == 4
    assert batches == list(sampler)


# Errors


@pytest.mark.parametrize(
    "lengths, message",
    [
        ([5, 11, 3], "example 1 has 11 tokens, above the budget of max_tokens=10; raise"),
        ([5, 11, 30], r"above the budget of max_tokens=10 \(the first of 2 such examples\)"),
        ([5, -1], "example 1 has length -1; an example has at least one token"),
        ([5, 0], "example 1 has length 0"),
        ([], "no lengths"),
        ([[1, 2]], r"lengths must be \(examples,\), not \(1, 2\)"),
        ([[1], [1, 2]], "lengths must be one integer for each example"),
        ([5, None], "not object: example 1 has None"),
        (np.array([5.0, 2.5]), "not float64: example 0 has 5.0"),
        (np.array([5.0, np.nan]), "not float64: example 1 has nan"),
        (pa.array([5, None]), "not float64: example 1 has nan"),
        ([True, False], "not bool: example 0 has True"),
        ([5, "7"], "example 0 has '5'"),
        ([2**70], "not object: example 0 has 1180591620717411303424"),
        (np.array([2**64 - 1], np.uint64), "example 0 has 18446744073709551615 tokens"),
    ],
)
def test_bad_lengths_are_named(lengths: Any, message: str) -> None:
    with pytest.raises(MRopeError, match=message):
        TokenBudgetSampler(lengths, 10)


@pytest.mark.parametrize(
    "form",
    [
        tuple,
        np.array,
        torch.tensor,
        pa.array,
        lambda lengths: pa.chunked_array([lengths[:2], lengths[2:]]),
        lambda lengths: np.array(lengths, np.uint16),
        lambda lengths: np.array(lengths, np.object_),
        lambda lengths: [torch.tensor(length) for length in lengths],
        lambda lengths: Dataset.from_dict({"length": lengths})["length"],
    ],
)
def test_columns_of_every_library_are_read(form: Any) -> None:
    lengths = [6, 5, 3, 4, 2]
    plain, given = (
        TokenBudgetSampler(some, 10, patches=some, max_patches=10)
        for some in (lengths, form(lengths))
    )
    assert list(given) == list(plain)


def test_an_example_that_fits_only_unrounded_is_named() -> None:
    message = (
        "example 0 has 9 tokens, above the budget of max_tokens=10, which is 8 before rounding"
    )
    with pytest.raises(MRopeError, match=message):
        TokenBudgetSampler([9], 10, pad_to_multiple_of=8)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1, not 0"),
        ({"max_tokens": 8e3}, TypeError, "max_tokens must be an int, not float"),
        ({"max_examples": 0}, ValueError, "max_examples must be at least 1, not 0"),
        ({"pad_to_multiple_of": 0}, ValueError, "pad_to_multiple_of must be at least 1"),
        ({"pad_to_multiple_of": 16}, ValueError, "max_tokens 10 is below pad_to_multiple_of 16"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"num_replicas": 0}, ValueError, "num_replicas must be at least 1"),
        ({"rank": -1}, ValueError, "rank must be at least 0"),
        ({"rank": 1}, ValueError, r"rank must be below num_replicas \(1\), not 1"),
    ],
)
def test_bad_arguments_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TokenBudgetSampler([5], **{"max_tokens": 10, **options})


def test_bad_epoch_is_named() -> None:
    with pytest.raises(ValueError, match="epoch must be at least 0, not -1"):
        TokenBudgetSampler([5], 10).set_epoch(-1)
