"""Resuming on other numbers of ranks and workers: every example once, whatever was cut where."""

from __future__ import annotations

import itertools
import json
import pickle
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from mrope import MRopeError
from mrope.prepare import TokenBudgetSampler, TokenBudgetStream
from prepare.test_streams import (
    Plain,
    Sample,
    Seekable,
    columns,
    flat,
    numbers,
    sharded,
    size,
    usual_mix,
)

# How many ranks (and workers) go on, and how many steps each takes before the next ones.
RANKS = st.integers(1, 9)
CUTS = st.lists(st.tuples(RANKS, st.integers(0, 6)), min_size=1, max_size=4)


# The sampler


def take(
    sampler: dict[str, Any], ranks: int, state: Any, steps: int | None
) -> tuple[list[int], Any]:
    """Return what all ranks take in so many steps, None for all, and the state after them."""
    taken, states = [], []
    for rank in range(ranks):
        batches = iter(TokenBudgetSampler(**sampler, rank=rank, num_replicas=ranks))
        if state is not None:
            batches.load_state_dict(state)
        taken += flat(itertools.islice(batches, steps))
        states.append(json.loads(json.dumps(batches.state_dict())))
    # Any rank's state serves all.
    assert all(one == states[0] for one in states)
    return taken, states[0]


def too_few(sampler: dict[str, Any], ranks: int) -> bool:
    """Whether the examples fill fewer batches than there are ranks, which is refused at first."""
    return len(TokenBudgetSampler(**sampler, rank=0, num_replicas=1)) < ranks


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 9)), min_size=1, max_size=80),
    CUTS,
    RANKS,
    st.sampled_from(["first fit", "budgets", "work", "no work"]),
    st.booleans(),
    st.booleans(),
)
def test_every_example_is_taken_once_by_whichever_ranks(
    sizes: list[tuple[int, int]],
    cuts: list[tuple[int, int]],
    last: int,
    kind: str,
    shuffle: bool,
    drop_last: bool,
) -> None:
    lengths, patches = map(list, zip(*sizes, strict=True))
    sampler: dict[str, Any] = {
        "lengths": lengths,
        "max_tokens": 20,
        "shuffle": shuffle,
        "drop_last": drop_last,
    }
    if kind != "first fit":
        sampler |= {"patches": patches, "max_patches": 12}
    if kind == "work" and shuffle:
        sampler["cost"] = lambda tokens, patches: tokens + patches**2
    if kind == "no work" and shuffle:
        # Examples that are left may have no work at all.
        sampler["cost"] = lambda tokens, patches: (tokens == tokens[0]).astype(int)
    if drop_last and too_few(sampler, max(ranks for ranks, _ in [*cuts, (last, 0)])):
        return
    taken, state = [], None
    for ranks, steps in [*cuts, (last, None)]:
        some, state = take(sampler, ranks, state, steps)
        taken += some
    seen = Counter(taken)
    if drop_last:
        assert set(seen.values()) <= {1}
        # Surplus batches, fewer than the last ranks.
        assert sum(lengths) - sum(lengths[one] for one in seen) <= 20 * (last - 1)
    else:
        assert sorted(seen) == list(range(len(sizes)))
        # A rank without an example repeats one, and only where there are fewer than ranks.
        assert seen.total() - len(sizes) < max(ranks for ranks, _ in [*cuts, (last, 0)])


def test_the_rest_is_within_the_budgets_and_even() -> None:
    rng = np.random.default_rng(0)
    lengths, patches = rng.integers(20, 400, 3000), rng.integers(0, 800, 3000)

    def cost(tokens: Any, patches: Any) -> Any:
        return tokens + patches**2 / 100

    work = cost(lengths, patches)
    options: dict[str, Any] = {"patches": patches, "max_patches": 5000, "cost": cost}
    whole = TokenBudgetSampler(lengths, 2000, **options, num_replicas=8, rank=0)
    batches = iter(whole)
    for _ in range(20):
        next(batches)
    fewer = TokenBudgetSampler(lengths, 2000, **options, num_replicas=6, rank=3)
    fewer.resume(batches.state_dict())
    assert sum(1 for _ in fewer) * 6 * 2000 < 1.1 * lengths[whole.plan(0).left(20)].sum()
    plan = fewer.plan(0, ((8, 20),))
    assert set(plan.examples_N) == set(whole.plan(0).left(20))
    for values, most in ((lengths, 2000), (patches, 5000)):
        assert np.add.reduceat(values[plan.examples_N], plan.borders[:-1]).max() <= most
    of_ranks = np.add.reduceat(work[plan.examples_N], plan.borders[:-1])[plan.grid_SR]
    assert (of_ranks.max(axis=1) / of_ranks.mean(axis=1)).mean() < 1.03


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sampler_resumes_the_state_of_a_loader_with_other_workers(workers: int) -> None:
    lengths = np.random.default_rng(7).integers(1, 200, 500)

    def loader(
        ranks: int, rank: int, workers: int, every: int = 1
    ) -> tuple[TokenBudgetSampler, Any]:
        sampler = TokenBudgetSampler(lengths, 999, rank=rank, num_replicas=ranks)
        rows: Any = range(500)
        options: Any = {"num_workers": workers, "snapshot_every_n_steps": every, "collate_fn": list}
        return sampler, StatefulDataLoader(rows, batch_sampler=sampler, **options)

    sampler, first = loader(2, 0, workers, every=3)
    sampler.set_epoch(4)
    batches = iter(first)
    taken = flat(next(batches) for _ in range(5))
    state = pickle.loads(pickle.dumps(first.state_dict()))
    other = TokenBudgetSampler(lengths, 999, rank=1, num_replicas=2)
    other.set_epoch(4)
    taken += flat(list(other)[:5])
    for rank in range(3):
        sampler, rest = loader(3, rank, 2 - workers)
        sampler.resume(state)
        taken += flat(rest)
        # The next pass is whole, and that of a run that was never cut.
        fresh = TokenBudgetSampler(lengths, 999, rank=rank, num_replicas=3)
        for one in (sampler, fresh):
            one.set_epoch(5)
        if rank == 2:
            assert list(rest) == list(fresh)
    assert sorted(taken) == list(range(500))


def test_a_sampler_at_its_end_has_nothing_to_resume() -> None:
    sampler = TokenBudgetSampler([5, 6, 7, 8], 10, shuffle=False)
    batches = iter(sampler)
    assert list(batches) == [[0], [1], [2], [3]]
    other = TokenBudgetSampler([5, 6, 7, 8], 10, shuffle=False, rank=0, num_replicas=2)
    rest = iter(other)
    rest.load_state_dict(batches.state_dict())
    assert list(rest) == []
    other.resume(batches.state_dict())
    assert list(other) == [[0], [2]]


# Streams


class OwnShards:
    """A source that divides itself by the two names that `datasets` has."""

    def __init__(self, samples: list[Sample], num_shards: int) -> None:
        self.samples, self.num_shards = samples, num_shards

    def shard(self, num_shards: int, index: int) -> Plain:
        return Plain(self.samples[index::num_shards])

    def __iter__(self) -> Iterator[Sample]:
        raise AssertionError("not read as a whole")


def source(kind: str, samples: list[Sample], shards: int) -> tuple[Any, dict[str, Any]]:
    if kind == "datasets":
        table = sharded(samples, min(shards, max(len(samples), 1)))
        return table, {}
    if kind == "shuffle buffer":
        return sharded(samples, min(shards, len(samples))).shuffle(seed=1, buffer_size=8), {}
    makers: dict[str, Any] = {"list": list, "plain": Plain, "seekable": Seekable}
    if kind == "own shards":
        return OwnShards(samples, shards), {"size": size}
    return makers[kind](samples), {"size": size}


def run_stream(
    make: Any, ranks: int, workers: int, states: list[Any] | None, steps: int | None, epoch: int = 0
) -> tuple[list[int], list[Any]]:
    """Return what all workers of all ranks put into batches, and their states.

    Workers are played by this process: a sample's place must not depend on who reads it.
    """
    taken, after = [], []
    for rank, worker in itertools.product(range(ranks), range(workers)):
        stream = make(rank=rank, num_replicas=ranks)
        stream.set_epoch(epoch)
        if states is not None:
            stream.resume(states)
        info = SimpleNamespace(id=worker, num_workers=workers)
        with mock.patch("mrope.prepare.stream_iterator.get_worker_info", lambda info=info: info):
            batches = iter(stream)
            # Workers of a rank take turns, so that the first may be one batch ahead.
            own = None if steps is None else -(-(steps - worker) // workers)
            taken += flat(numbers(itertools.islice(batches, own)))
            after.append(json.loads(json.dumps(batches.state_dict())))
    return taken, after


@pytest.mark.filterwarnings("ignore:the source has a shuffle buffer")
@settings(deadline=None, max_examples=150)
@given(st.data())
def test_every_sample_is_read_once_by_whichever_workers(data: Any) -> None:
    kind = data.draw(
        st.sampled_from(["list", "plain", "seekable", "own shards", "datasets", "shuffle buffer"])
    )
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=90))
    samples = [(number, length, 0) for number, length in enumerate(lengths)]
    shards = data.draw(st.integers(1, 7))
    options = {"buffer_size": data.draw(st.integers(1, 12)), "shuffle": data.draw(st.booleans())}
    epoch = data.draw(st.integers(0, 2))

    def make(**rank: Any) -> TokenBudgetStream:
        made, more = source(kind, samples, shards)
        return TokenBudgetStream(made, 24, **options, **more, **rank)

    cuts = data.draw(
        st.lists(
            st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 5)),
            min_size=1,
            max_size=4,
        )
    )
    taken, states = [], None
    for ranks, workers, steps in cuts:
        if states is not None and not any_left(make, states):
            break
        some, states = run_stream(make, ranks, workers, states, steps, epoch)
        taken += some
    if any_left(make, states):
        taken += run_stream(make, data.draw(st.integers(1, 4)), 2, states, None, epoch)[0]
    assert sorted(taken) == list(range(len(samples)))


def any_left(make: Any, states: Any) -> bool:
    """Whether the epoch goes on; at its end the next pass would be a whole one."""
    stream = make(rank=0, num_replicas=1)
    stream.resume(states)
    return bool(stream.take_resumed(0))


def loaders(make: Any, ranks: int, workers: int, states: Any, **options: Any) -> list[Any]:
    made = []
    for rank in range(ranks):
        stream = make(rank=rank, num_replicas=ranks)
        if states is not None:
            stream.resume(states)
        made.append(
            StatefulDataLoader(
                stream, batch_size=None, num_workers=workers, collate_fn=list, **options
            )
        )
    return made


def test_loaders_go_on_with_other_ranks_and_workers() -> None:
    """8 ranks become 6 and then 7, with workers, none and more of them; one state for each rank."""

    def make(**rank: Any) -> TokenBudgetStream:
        return TokenBudgetStream(sharded(usual_mix(900), 16), 8192, buffer_size=16, **rank)

    taken, states = [], None
    for ranks, workers, steps in ((4, 2, 5), (3, 0, 6), (2, 1, None)):
        made = loaders(make, ranks, workers, states)
        taken += flat(flat([numbers(itertools.islice(one, steps)) for one in made]))
        states = pickle.loads(pickle.dumps([one.state_dict() for one in made]))
    assert sorted(taken) == list(range(900))


@pytest.mark.parametrize("workers, persistent", [(0, False), (2, False), (2, True)])
def test_only_the_next_pass_is_the_rest(workers: int, persistent: bool) -> None:
    def make(**rank: Any) -> TokenBudgetStream:
        return TokenBudgetStream(usual_mix(300), 8192, buffer_size=16, size=size, **rank)

    batches = iter(make())
    taken = flat(numbers(itertools.islice(batches, 5)))
    stream = make()
    stream.resume([batches.state_dict()])
    options: Any = {"persistent_workers": True} if persistent else {}
    loader = DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=list, **options)
    rest, whole = flat(numbers(loader)), flat(numbers(loader))
    assert sorted(taken + rest) == sorted(whole) == list(range(300))


def test_as_many_ranks_and_workers_go_on_batch_by_batch() -> None:
    def make(**rank: Any) -> TokenBudgetStream:
        return TokenBudgetStream(sharded(usual_mix(300), 4), 8192, buffer_size=16, **rank)

    whole = [numbers(make(rank=rank, num_replicas=2)) for rank in range(2)]
    runs = [iter(make(rank=rank, num_replicas=2)) for rank in range(2)]
    begun = [numbers(itertools.islice(run, 4)) for run in runs]
    for rank in range(2):
        stream = make(rank=rank, num_replicas=2)
        stream.resume([run.state_dict() for run in runs[::-1]])
        assert begun[rank] + numbers(stream) == whole[rank]


def test_a_map_style_source_is_read_by_index() -> None:
    class Rows:
        read: ClassVar[list[int]] = []

        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> Sample:
            self.read.append(index)
            return index, 5, 0

    made: Any
    for made in (Rows(), columns([(row, 5, 0) for row in range(40)])):
        options: Any = {} if isinstance(made, datasets.Dataset) else {"size": size}
        stream = TokenBudgetStream(made, 20, rank=1, num_replicas=4, **options)
        assert sorted(flat(numbers(stream))) == list(range(1, 40, 4))
    assert Rows.read == list(range(1, 40, 4))


def state_of(made: Any, steps: int = 2, **rank: Any) -> dict[str, Any]:
    batches = iter(TokenBudgetStream(made, 24, size=size, buffer_size=6, **rank))
    for _ in range(steps):
        next(batches)
    return batches.state_dict()


SAMPLES = [(number, 5 + number % 7, 0) for number in range(60)]
HALVES = [state_of(SAMPLES, rank=rank, num_replicas=2) for rank in range(2)]


@pytest.mark.parametrize(
    "made, states, message",
    [
        (SAMPLES, HALVES[:1], r"states are those of shares \[0\], not of each of 2"),
        (
            SAMPLES,
            [*HALVES, HALVES[0]],
            r"states are those of shares \[0, 0, 1\], not of each of 2",
        ),
        (SAMPLES, [], "there are no states to resume"),
        (SAMPLES, [{"weights": 1}], "not a state of TokenBudgetStream: it has no share"),
        (SAMPLES, [HALVES[0], {**HALVES[1], "epoch": 3}], r"states have epoch \[0, 3\], not one"),
        (OwnShards(SAMPLES, 3), HALVES, "had 1 shards when the state was saved, and has 3 now"),
        (
            SAMPLES,
            [{"_steps_since_snapshot": 2, "_snapshot": HALVES}],
            "saved its state 2 batches late, .*snapshot_every_n_steps=1",
        ),
        (SAMPLES[:8], HALVES, "sample [0-9]+ of shard 0 is no longer there; the source changed"),
        (
            [(n, 9, 0) for n in range(60)],
            HALVES,
            "has another length than when the state was saved",
        ),
    ],
)
def test_states_that_cannot_be_resumed_are_named(made: Any, states: Any, message: str) -> None:
    stream = TokenBudgetStream(made, 24, size=size, buffer_size=6)

    def go_on() -> None:
        stream.resume(states)
        list(stream)

    with pytest.raises(MRopeError, match=message):
        go_on()


def test_a_source_that_divides_itself_says_what_can_be_resumed() -> None:
    states = [
        state_of(SAMPLES[rank::2], rank=rank, num_replicas=2, presharded=True) for rank in range(2)
    ]
    stream = TokenBudgetStream(SAMPLES, 24, size=size, presharded=True)
    stream.resume(states)
    with pytest.raises(
        MRopeError,
        match="presharded=True leaves it to the source what each reads; .* pass a source",
    ):
        list(stream)
    # As many as before go on.
    stream = TokenBudgetStream(
        SAMPLES[1::2], 24, size=size, presharded=True, rank=1, num_replicas=2
    )
    stream.resume(states)
    assert len(flat(stream)) == 30 - len(flat(states_taken(states[1])))


def test_a_stream_that_counts_samples_is_divided_as_datasets_does() -> None:
    """An endless repetition of one shard would never come to the next."""
    table = sharded(usual_mix(40), 4)
    counting = {
        "repeat": (table.repeat(None), 12, range(40)),
        "take": (table.take(10), None, range(10)),
        "skip": (table.skip(10), None, range(10, 40)),
    }
    for name, (made, steps, rows) in counting.items():
        stream = TokenBudgetStream(made, 8192, buffer_size=8)
        assert set(flat(numbers(itertools.islice(stream, steps)))) == set(rows), name
        states = [iter(TokenBudgetStream(made, 8192, buffer_size=8)).state_dict()]
        other = TokenBudgetStream(made, 8192, rank=0, num_replicas=2)
        other.resume(states)
        with pytest.raises(MRopeError, match="repeat, skip or take decides what each reads"):
            next(iter(other))


def states_taken(state: dict[str, Any]) -> list[range]:
    """Return what a presharded worker has put into batches, as positions."""
    waiting = {one for _, positions, _ in state["waiting"] for one in positions}
    return [range(state["read"] - len(waiting))]
