"""Batches from streams: budgets, pace, shares of ranks and workers, resuming, errors."""

from __future__ import annotations

import itertools
import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from mrope import MRopeCollator, MRopeError
from mrope.prepare import Precheck, TokenBudgetStream, stop_together
from mrope.prepare.buffer import choose
from support.rows import assert_same_batch, row_of
from support.specs import example_spec

Sample = tuple[int, int, int]  # its number, its tokens, its patches
BUDGET, PATCHES = 8192, 12_000


def size(sample: Sample) -> tuple[int, int]:
    return sample[1:]


def usual_mix(count: int, seed: int = 0) -> list[Sample]:
    """Return samples of lognormal lengths, median 400 tokens; two of three have images."""
    rng = np.random.default_rng(seed)
    tokens = np.clip(rng.lognormal(np.log(400), 1, count), 16, BUDGET).astype(int)
    patches = np.where(rng.random(count) < 2 / 3, tokens * rng.uniform(1, 3.6, count), 0)
    sizes = zip(tokens.tolist(), patches.clip(0, PATCHES).astype(int).tolist(), strict=True)
    return [(number, *one) for number, one in enumerate(sizes)]


class Plain(IterableDataset[Sample]):
    """A stream without a state."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Sample]:
        yield from self.samples


class Seekable(Plain):
    """A stream whose iterator has a state; counts the samples read since it was made."""

    def __iter__(self) -> SeekableIterator:
        return SeekableIterator(self.samples)


class SeekableIterator(Iterator[Sample]):
    reads = 0

    def __init__(self, samples: list[Sample]) -> None:
        self.samples, self.live = samples, {"next": 0}

    def __next__(self) -> Sample:
        if self.live["next"] == len(self.samples):
            raise StopIteration
        SeekableIterator.reads += 1
        self.live["next"] += 1
        return self.samples[self.live["next"] - 1]

    def state_dict(self) -> dict[str, int]:
        return self.live  # on purpose not a copy

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.live = dict(state)


def columns(samples: list[Sample]) -> datasets.Dataset:
    names = ("id", "mrope_length", "mrope_patches")
    return datasets.Dataset.from_list([dict(zip(names, one, strict=True)) for one in samples])


def sharded(samples: list[Sample], shards: int = 4) -> datasets.IterableDataset:
    return columns(samples).to_iterable_dataset(num_shards=shards)


def numbers(batches: Any) -> list[list[int]]:
    return [[one["id"] if isinstance(one, dict) else one[0] for one in batch] for batch in batches]


def flat(batches: Any) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


# How batches are filled


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_usual_mix_fills_the_budget(shuffle: bool) -> None:
    samples = usual_mix(12_000)
    stream = TokenBudgetStream(samples, BUDGET, size=size, shuffle=shuffle)
    batches = list(stream)
    fill = np.array([sum(one[1] for one in batch) for batch in batches]) / BUDGET
    assert fill.max() <= 1
    # 0.9996 measured, and 0.98 with the batches that drain the buffer.
    assert fill[:-40].mean() > 0.998
    assert fill.mean() > 0.95
    assert sorted(flat(numbers(batches))) == list(range(12_000))


def test_both_budgets_hold_and_one_of_them_is_filled() -> None:
    samples = usual_mix(12_000)
    batches = list(TokenBudgetStream(samples, BUDGET, max_patches=PATCHES, size=size))
    sums = np.array([np.sum([one[1:] for one in batch], axis=0) for batch in batches])
    fill = sums / (BUDGET, PATCHES)
    assert fill.max() <= 1
    assert fill.max(axis=1)[:-40].mean() > 0.99


@settings(deadline=None)
@given(st.data())
def test_any_stream_is_batched_whole_and_within_its_budgets(data: Any) -> None:
    sizes = st.tuples(st.integers(1, 20), st.integers(0, 30))
    samples = [(number, *one) for number, one in enumerate(data.draw(st.lists(sizes, max_size=60)))]
    options = {
        "max_patches": data.draw(st.sampled_from([None, 30, 50])),
        "max_examples": data.draw(st.sampled_from([None, 1, 3])),
        "buffer_size": data.draw(st.integers(1, 20)),
        "shuffle": data.draw(st.booleans()),
    }
    stream = TokenBudgetStream(samples, 25, pad_to_multiple_of=4, size=size, **options)
    batches = list(stream)
    assert sorted(flat(numbers(batches))) == list(range(len(samples)))
    for batch in batches:
        assert 1 <= len(batch) <= (options["max_examples"] or 60)
        assert sum(one[1] for one in batch) <= 24
        assert sum(one[2] for one in batch) <= (options["max_patches"] or 10**9)
    assert list(stream) == batches


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(9, 20))
def test_nothing_that_is_left_would_fit(lengths: list[int], budget: int) -> None:
    sizes = np.array([[length, 0] for length in lengths])
    chosen = choose(sizes, np.array([budget, 0]), None, np.arange(len(lengths))).tolist()
    room = budget - sum(lengths[place] for place in chosen)
    assert chosen[0] == 0
    assert room >= 0
    assert all(lengths[place] > room for place in set(range(len(lengths))) - set(chosen))


def test_the_oldest_sample_is_in_every_batch() -> None:
    # The long one fits beside no other, and best-fit alone would never choose it.
    samples = [(0, 1, 0), (1, 100, 0), *((number, 50, 0) for number in range(2, 200))]
    batches = numbers(TokenBudgetStream(samples, 100, size=size, buffer_size=16, shuffle=True))
    left = set(range(200))
    for batch in batches:
        assert min(left) == batch[0]
        left -= set(batch)


def test_an_epoch_has_its_own_batches() -> None:
    stream = TokenBudgetStream(usual_mix(600), BUDGET, size=size, buffer_size=64)
    first = numbers(stream)
    stream.set_epoch(1)
    assert numbers(stream) != first
    stream.set_epoch(0)
    assert numbers(stream) == first
    assert numbers(TokenBudgetStream(usual_mix(600), BUDGET, size=size, buffer_size=64)) == first


def test_the_sizes_of_precheck_are_not_passed_on() -> None:
    row = {"id": 3, "mrope_length": np.int64(5), "mrope_patches": torch.tensor(4)}
    assert list(TokenBudgetStream([row], 8, max_patches=4)) == [[{"id": 3}]]


# The pace: lmms-engine#162 read nothing for eight batches, and then samples for eight


@pytest.mark.parametrize("shuffle", [False, True])
def test_as_many_samples_are_read_before_each_batch(shuffle: bool) -> None:
    source = Seekable(usual_mix(20_000))
    SeekableIterator.reads = 0
    reads, taken = [0], []
    for batch in TokenBudgetStream(source, BUDGET, size=size, shuffle=shuffle):
        reads.append(SeekableIterator.reads)
        taken.append(len(batch))
    assert reads[1] == 448  # 7/8 of the buffer, before the first batch
    between, mean = np.diff(reads)[1:-60], np.mean(taken)
    assert min(taken) < 0.2 * mean
    assert max(taken) > 2 * mean
    # After the first batch, reads stay within a quarter of their mean although batches do not.
    assert between.min() > 0.75 * mean
    assert between.max() < 1.25 * mean


def test_a_buffer_is_never_above_its_size() -> None:
    stream = TokenBudgetStream(usual_mix(3000), BUDGET, size=size, buffer_size=24)
    batches = iter(stream)
    for _ in range(200):
        taken = len(next(batches))
        assert len(batches.state_dict()["waiting"]) + taken <= 24


# Ranks and workers


def shares(
    make: Callable[[], Any], ranks: int, workers: int, **options: Any
) -> list[list[list[int]]]:
    """Return the batches of each rank, through a DataLoader with workers."""
    found = []
    for rank in range(ranks):
        stream = TokenBudgetStream(
            make(), BUDGET, buffer_size=64, rank=rank, num_replicas=ranks, **options
        )
        loader = DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=list)
        found.append(numbers(loader))
    return found


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 0), (2, 2)])
@pytest.mark.parametrize("kind", ["plain", "4 shards", "3 shards"])
def test_ranks_and_workers_divide_the_stream(kind: str, ranks: int, workers: int) -> None:
    samples = usual_mix(700)
    if kind == "plain":
        found = shares(lambda: Plain(samples), ranks, workers, size=size)
    else:
        found = shares(lambda: sharded(samples, int(kind[0])), ranks, workers)
    counts = Counter(flat(flat(found)))
    assert sorted(counts) == list(range(700))
    assert set(counts.values()) == {1}
    assert min(len(share) for share in found) > 0


def test_a_source_that_is_divided_already_is_not_divided_again() -> None:
    half = datasets.distributed.split_dataset_by_node(sharded(usual_mix(100)), 1, 2)
    with pytest.raises(MRopeError, match="already divided by split_dataset_by_node"):
        TokenBudgetStream(half, BUDGET, rank=1, num_replicas=2)
    stream = TokenBudgetStream(half, BUDGET, rank=1, num_replicas=2, presharded=True)
    assert len(flat(stream)) == 50


def stop_at_the_shortest(rank: int, address: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    taken = list(stop_together(range(5 - 2 * rank)))
    again = list(stop_together(iter("ab" if rank else "abc")))
    (Path(folder) / str(rank)).write_text(json.dumps([taken, again]))
    dist.destroy_process_group()


def test_ranks_stop_at_the_same_step(tmp_path: Path) -> None:
    arguments = (f"file://{tmp_path}/store", str(tmp_path))
    # Forked: a fresh process would first import all of this again.
    start: Any = mp.start_processes  # type: ignore[attr-defined]
    start(stop_at_the_shortest, arguments, nprocs=2, start_method="fork")
    for rank in "01":
        assert json.loads((tmp_path / rank).read_text()) == [[0, 1, 2], ["a", "b"]]


@pytest.mark.parametrize("others", [[1, 1, 0], [1, 1, 1, 1]])
def test_a_rank_tells_the_others_whether_it_has_a_batch(
    monkeypatch: pytest.MonkeyPatch, others: list[int]
) -> None:
    """What one of two ranks does, with the other's answers; above, both are real."""
    told: list[int] = []
    groups: list[str] = []

    def all_reduce(has_batch: torch.Tensor, op: Any, group: Any) -> None:
        assert (op, group) == (dist.ReduceOp.MIN, "group of gloo")
        told.append(int(has_batch))
        has_batch.fill_(min(told[-1], others[len(told) - 1]))

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "new_group", lambda backend: f"group of {backend}")
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "destroy_process_group", groups.append)
    taken = list(stop_together([None, 7, None]))
    # A batch may be anything, None too.
    assert taken == [None, 7, None][: others.index(0) if 0 in others else 3]
    assert told == ([1, 1, 1] if 0 in others else [1, 1, 1, 0])
    assert groups == ["group of gloo"]


def test_one_rank_alone_takes_all_batches() -> None:
    assert list(stop_together([1, 2])) == [1, 2]


# Resuming


def without_thirds(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Leave out the third row of every batch."""
    return {name: column[:2] + column[3:] for name, column in rows.items()}


@pytest.fixture
def parquet(tmp_path: Path) -> list[str]:
    files = [str(tmp_path / f"{number}.parquet") for number in range(4)]
    for number, file in enumerate(files):
        columns(usual_mix(600)).shard(4, number, contiguous=True).to_parquet(file, batch_size=50)
    return files


KINDS = ["plain", "seekable", "shards", "files", "mapped", "mixed", "shuffle buffer"]


def source(kind: str, files: list[str]) -> tuple[Any, dict[str, Any]]:
    """Return a source of a kind, and the options that its samples need."""
    if kind in ("plain", "seekable"):
        return {"plain": Plain, "seekable": Seekable}[kind](usual_mix(600)), {"size": size}
    stream = datasets.IterableDataset.from_parquet(files)
    if kind == "shards":
        return sharded(usual_mix(600)), {}
    if kind == "mapped":
        return stream.map(without_thirds, batched=True, batch_size=7).filter(
            lambda row: row["id"] % 5
        ), {}
    if kind == "mixed":
        other = sharded([(1000 + one[0], *one[1:]) for one in usual_mix(300, seed=1)])
        return datasets.interleave_datasets(
            [sharded(usual_mix(600)), other], [0.7, 0.3], seed=1
        ), {}
    if kind == "shuffle buffer":
        return sharded(usual_mix(600)).shuffle(seed=3, buffer_size=100), {}
    return stream, {}


def loader_of(kind: str, files: list[str], workers: int, **rank: Any) -> StatefulDataLoader[Any]:
    stream, options = source(kind, files)
    batches: Any = TokenBudgetStream(stream, BUDGET, buffer_size=48, **options, **rank)
    return StatefulDataLoader(batches, batch_size=None, num_workers=workers, collate_fn=list)


@pytest.mark.filterwarnings("ignore:the source has a shuffle buffer")
# Every kind alone, and one of each way to read with workers, whose start takes most of the time.
@pytest.mark.parametrize(
    ("kind", "workers"), [*((kind, 0) for kind in KINDS), ("plain", 2), ("files", 2)]
)
def test_a_resumed_stream_repeats_nothing_and_loses_nothing(
    kind: str, workers: int, parquet: list[str]
) -> None:
    whole = numbers(loader_of(kind, parquet, workers))
    for stop in [7] if workers else sorted({0, 1, 7, len(whole) // 2, len(whole) - 1}):
        first = loader_of(kind, parquet, workers)
        batches = iter(first)
        taken = numbers(itertools.islice(batches, stop))
        state = pickle.loads(pickle.dumps(first.state_dict()))
        second = loader_of(kind, parquet, workers)
        second.load_state_dict(state)
        assert taken + numbers(second) == whole, stop


def test_two_ranks_resume_each_from_its_own_state(parquet: list[str]) -> None:
    found = []
    for rank in range(2):
        first = loader_of("files", parquet, 2, rank=rank, num_replicas=2)
        found += numbers(itertools.islice(first, 5))
        second = loader_of("files", parquet, 2, rank=rank, num_replicas=2)
        second.load_state_dict(first.state_dict())
        found += numbers(second)
    assert sorted(flat(found)) == list(range(600))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_later_epoch_resumes_and_the_next_one_is_whole(workers: int) -> None:
    def make() -> tuple[TokenBudgetStream, StatefulDataLoader[Any]]:
        # From epoch 1 on, `datasets` shuffles the shards.
        stream = TokenBudgetStream(sharded(usual_mix(600)), BUDGET, buffer_size=48)
        options: Any = {"persistent_workers": True} if workers else {}
        return stream, StatefulDataLoader(
            stream, batch_size=None, num_workers=workers, collate_fn=list, **options
        )

    stream, loader = make()
    epochs, state = [], {}
    for epoch in range(3):
        stream.set_epoch(epoch)
        batches = iter(loader)
        epochs.append(numbers(itertools.islice(batches, 6)))
        if epoch == 1:
            state = loader.state_dict()
        epochs[-1] += numbers(batches)
        assert sorted(flat(epochs[-1])) == list(range(600))
    assert epochs[0] != epochs[1] != epochs[2]
    stream, loader = make()
    loader.load_state_dict(state)
    assert numbers(loader) == epochs[1][6:]
    stream.set_epoch(2)
    assert numbers(loader) == epochs[2]


def test_the_epoch_of_the_source_is_not_written_to() -> None:
    # Workers share it, and `datasets` sets it by adding a difference, which two may do at once.
    source = sharded(usual_mix(100))
    stream = TokenBudgetStream(source, BUDGET)
    stream.set_epoch(2)
    assert sorted(flat(numbers(stream))) == list(range(100))
    assert source.epoch == 0


def test_resuming_reads_little_more_than_the_buffer() -> None:
    source = Seekable(usual_mix(20_000))
    for shuffle, most in ((False, 1.3), (True, 5)):
        batches = iter(TokenBudgetStream(source, BUDGET, size=size, shuffle=shuffle))
        for _ in range(1000):
            next(batches)
        state = batches.state_dict()
        again = iter(TokenBudgetStream(source, BUDGET, size=size, shuffle=shuffle))
        SeekableIterator.reads = 0
        again.load_state_dict(state)
        assert SeekableIterator.reads < most * 512
        assert numbers(again) == numbers(batches)


def test_a_state_has_no_samples_and_is_small() -> None:
    stream = TokenBudgetStream(sharded(usual_mix(5000)), BUDGET)
    batches = iter(stream)
    for _ in range(100):
        next(batches)
    assert len(json.dumps(batches.state_dict())) < 6000


def test_a_state_of_another_share_is_refused() -> None:
    batches = iter(TokenBudgetStream([5], 8, size=lambda n: (n, 0), rank=0, num_replicas=2))
    other = iter(TokenBudgetStream([5], 8, size=lambda n: (n, 0), rank=1, num_replicas=2))
    with pytest.raises(MRopeError, match="state is that of share 0 of 2 .* has share 1 of 2"):
        other.load_state_dict(batches.state_dict())
    with pytest.raises(MRopeError, match="not a state of TokenBudgetStream: it has no share"):
        other.load_state_dict({})


def test_budgets_and_buffer_may_change() -> None:
    samples = usual_mix(600)
    batches = iter(TokenBudgetStream(samples, BUDGET, size=size, buffer_size=128))
    taken = numbers(itertools.islice(batches, 5))
    again = iter(TokenBudgetStream(samples, 10_000, max_patches=PATCHES, size=size, buffer_size=32))
    again.load_state_dict(batches.state_dict())
    assert sorted(flat(taken + numbers(again))) == list(range(600))


@pytest.mark.parametrize("change", ["shorter", "another order"])
def test_a_source_that_changed_is_refused(change: str) -> None:
    samples = usual_mix(300)
    batches = iter(TokenBudgetStream(samples, BUDGET, size=size, buffer_size=64))
    next(batches)
    changed = samples[:40] if change == "shorter" else samples[::-1]
    again = iter(TokenBudgetStream(changed, BUDGET, size=size, buffer_size=64))
    with pytest.raises(MRopeError, match="the source changed since the state was saved"):
        again.load_state_dict(batches.state_dict())


def test_a_shuffle_buffer_of_datasets_is_warned_of() -> None:
    shuffled = sharded(usual_mix(50)).shuffle(seed=1, buffer_size=10)
    for one in (shuffled, datasets.interleave_datasets([shuffled, shuffled]).skip(3)):
        with pytest.warns(UserWarning, match="shuffle buffer .* not part of its state"):
            TokenBudgetStream(one, BUDGET)


# With the collator


def collated_rows() -> list[dict[str, Any]]:
    """Return rows with text and images as lists, with the sizes that Precheck finds."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(40):
        images = [(4, 2 * int(width)) for width in rng.integers(1, 4, number % 3)]
        row = row_of("qwen3_vl", tuple(images), text=int(rng.integers(1, 30)), mark=number)
        row["input_ids"][0] = 200 + number
        columns = {name: value.tolist() for name, value in row.items()}
        rows.append({**dict.fromkeys(("image_grid_thw", "pixel_values")), **columns})
    return rows


@pytest.mark.parametrize("workers", [0, 2])
def test_flattened_batches_are_those_made_by_hand(workers: int) -> None:
    spec, rows = example_spec("qwen3_vl"), collated_rows()
    collate = MRopeCollator(None, spec, packing="flatten")
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2)
    stream = stream.map(Precheck(spec), batched=True)
    batches = TokenBudgetStream(stream, 64, max_patches=48, buffer_size=8, shuffle=False)
    loader = DataLoader(batches, batch_size=None, num_workers=workers, collate_fn=collate)
    made = list(loader)
    by_ids = {tuple(row["input_ids"]): row for row in rows}
    assert len(by_ids) == 40
    left = 40
    for batch in made:
        borders = batch["cu_seq_lens_q"].tolist()
        assert borders[-1] <= 64
        ids = batch["input_ids"][0].tolist()
        parts = [tuple(ids[start:stop]) for start, stop in itertools.pairwise(borders)]
        grids = batch.get("image_grid_thw")
        assert grids is None or grids.prod(-1).sum() <= 48
        assert_same_batch(batch, collate([by_ids[part] for part in parts]))
        left -= len(parts)
    assert left == 0


# Errors


@pytest.mark.parametrize(
    ("sample", "text"),
    [
        ({"id": "a"}, r"sample 0 \(id a\) .* has no size \(KeyError\('mrope_length'\)\): map Pre"),
        ({"mrope_length": 2.5, "mrope_patches": 0}, "sample 0 of those .* has no size"),
        (np.arange(3), r"sample 0 of those .* has no size \(IndexError"),
        (object(), r"sample 0 of those .* has no size \(TypeError"),
        ({"mrope_length": 0, "mrope_patches": 0}, "has 0 tokens and 0 patches"),
        (
            {"id": 7, "mrope_length": 9, "mrope_patches": 0},
            r"sample 0 \(id 7\) .* has 9 tokens, above the budget of max_tokens=10, which is 8 "
            "before rounding up; raise max_tokens, or filter such samples out",
        ),
        (
            {"mrope_length": 8, "mrope_patches": 21},
            "has 21 patches, above the budget of max_patches=20; raise max_patches",
        ),
    ],
)
def test_a_sample_that_fits_no_batch_is_named(sample: Any, text: str) -> None:
    stream = TokenBudgetStream([sample], 10, max_patches=20, pad_to_multiple_of=4)
    with pytest.raises(MRopeError, match=text):
        list(stream)


def test_arguments_out_of_range() -> None:
    with pytest.raises(TypeError, match="not the iterator list_iterator"):
        TokenBudgetStream(iter([1]), 8)
    with pytest.raises(TypeError, match="max_tokens must be an int"):
        TokenBudgetStream([], 8.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="buffer_size must be at least 1"):
        TokenBudgetStream([], 8, buffer_size=0)
    with pytest.raises(ValueError, match="max_tokens 3 is below pad_to_multiple_of 4"):
        TokenBudgetStream([], 3, pad_to_multiple_of=4)
    with pytest.raises(ValueError, match="rank must be below num_replicas"):
        TokenBudgetStream([], 8, rank=1, num_replicas=1)


def test_a_stream_pickles() -> None:
    stream = TokenBudgetStream(sharded(usual_mix(100)), BUDGET)
    stream.set_epoch(2)
    twin = pickle.loads(pickle.dumps(stream))
    assert twin.epoch == 2
    assert numbers(twin) == numbers(stream)
