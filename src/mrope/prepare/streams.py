"""Batch a stream up to token and patch budgets: `TokenBudgetStream`, a torch `IterableDataset`.

Samples are read into a buffer, from which each batch takes the oldest sample, others in order or
at random until one does not fit, and then the best fit for what is left.

Shape suffixes: B samples in the buffer.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from mrope.arrays import as_whole
from mrope.errors import MRopeError
from mrope.prepare.buffer import IntArray, choose
from mrope.prepare.lanes import Lane, Part, Share, deal, what_is_left
from mrope.prepare.precheck import ADDED, LENGTH, NAMES, PATCHES
from mrope.prepare.ranks import find_rank
from mrope.prepare.saved import find_states
from mrope.prepare.shards import Shards, has_shuffle_buffer, is_datasets_stream
from mrope.prepare.stream_reader import Place, Read, StreamReader

Size = Callable[[Any], tuple[int, int]]

# Batches over which the number of reads follows the number of samples taken.
_PACE = 32
# Workers of a rank, at most.
_WORKERS = 4096
# Keys that a state has, and nothing around it.
_KEYS = {"share", "waiting"}


class Waiting(NamedTuple):
    """A sample in the buffer: where it was read, and its tokens and patches."""

    place: Place
    sample: Any
    tokens: int
    patches: int


class TokenBudgetStream(IterableDataset[list[Any]]):
    """Fill batches from a stream up to a token budget, and a patch budget if there is one.

    Yields lists of samples: `DataLoader(stream, batch_size=None, collate_fn=MRopeCollator(...))`.

    Args:
        source: a `datasets.IterableDataset`, a map-style dataset, a torch `IterableDataset`, or
            any other iterable that starts again with every `iter`.
        max_tokens: maximum number of tokens in a batch, after rounding up.
        max_patches: maximum number of patches in a batch; None: no limit.
        max_examples: maximum number of samples in a batch; None: no limit.
        pad_to_multiple_of: the collator's value: a flattened row is padded to a multiple of it.
        buffer_size: maximum number of samples in the buffer of one worker.
        size: returns tokens and patches of a sample. None: its columns `mrope_length` and
            `mrope_patches`; all columns that `Precheck` adds are then removed from the sample.
        shuffle: take samples from the buffer at random, the same ones with the same seed and epoch;
            see `set_epoch`. The oldest sample is always taken. False: in the order of the stream.
        seed: seed of the random choice.
        presharded: the source already yields only the samples of this rank, and of the worker that
            iterates over it. False: it is divided over ranks and workers here.
        rank, num_replicas: default to those of torch.distributed if it is initialised, else 0 and
            1.

    A source with `num_shards` and `shard(num_shards=..., index=...)`, such as a
    `datasets.IterableDataset`, is divided shard by shard over ranks and their workers. Of another
    source, a worker of a rank keeps `position % (ranks * workers) == rank * workers + worker`; of
    a map-style dataset it reads no others.

    Raises:
        TypeError: an argument that must be an int is not, or the source is an iterator.
        ValueError: an argument is out of range.
        MRopeError: the source was already split by `split_dataset_by_node`. While iterating: a
            sample without a size, or one that does not fit into an empty batch.

    Example:
        >>> lengths = [6, 5, 3, 4, 2]
        >>> stream = TokenBudgetStream(lengths, 10, size=lambda n: (n, 0), shuffle=False)
        >>> list(stream)
        [[6, 4], [5, 3, 2]]
    """

    def __init__(
        self,
        source: Iterable[Any],
        max_tokens: int,
        *,
        max_patches: int | None = None,
        max_examples: int | None = None,
        pad_to_multiple_of: int = 1,
        buffer_size: int = 512,
        size: Size | None = None,
        shuffle: bool = True,
        seed: int = 0,
        presharded: bool = False,
        rank: int | None = None,
        num_replicas: int | None = None,
    ) -> None:
        multiple = as_whole("pad_to_multiple_of", pad_to_multiple_of, 1)
        self.max_tokens = as_whole("max_tokens", max_tokens, 1)
        self.capacity = self.max_tokens // multiple * multiple
        if not self.capacity:
            raise ValueError(f"max_tokens {max_tokens} is below pad_to_multiple_of {multiple}")
        self.max_patches = None if max_patches is None else as_whole("max_patches", max_patches, 0)
        self.max_examples = (
            None if max_examples is None else as_whole("max_examples", max_examples, 1)
        )
        self.buffer_size = as_whole("buffer_size", buffer_size, 1)
        self.size = size
        self.shuffle = bool(shuffle)
        self.seed = as_whole("seed", seed, 0)
        self.presharded = bool(presharded)
        self.rank, self.num_replicas = find_rank(rank, num_replicas)
        self.source = source
        self.shards = Shards(source, presharded=self.presharded)
        _warn_of_shuffle_buffer(source)
        self._resumed: list[Mapping[str, Any]] = []
        # Whether a worker has taken what was resumed, in shared memory: the copy of a worker that
        # is started for a later epoch has it too.
        self._resumed_by = torch.zeros(_WORKERS, dtype=torch.bool)
        self._resumed_by.share_memory_()  # type: ignore[no-untyped-call]
        # In shared memory: persistent workers keep the copy that they were started with.
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of later iterators, and that of a source with a `set_epoch`."""
        self._epoch.fill_(as_whole("epoch", epoch, 0))

    @property
    def epoch(self) -> int:
        """The epoch of later iterators."""
        return int(self._epoch)

    def __iter__(self) -> TokenBudgetStreamIterator:
        return TokenBudgetStreamIterator(self)

    def resume(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Let the next pass finish the epoch of saved states, on any number of ranks and workers.

        Args:
            states: those of all workers of all ranks, in any order: of each rank the state of its
                `StatefulDataLoader`, or `state_dict()` of each iterator.

        Raises:
            MRopeError: a state of a worker is missing or there twice; they are of several epochs,
                or of a source with other shards; or a loader saved it some batches late.
        """
        found = [
            pair for each in states for pair in find_states(each, type(self).__name__, _KEYS)
        ]
        self._require_complete(found)
        states = [state for state, _ in found]
        # At the end of its epoch nothing is left, and the next pass is a whole one.
        self._resumed = states if what_is_left(states) else []
        self._resumed_by.zero_()

    def take_resumed(self, worker: int) -> list[Mapping[str, Any]]:
        """Return the states that the present pass of a worker resumes, once."""
        given = bool(self._resumed_by[worker])
        self._resumed_by[worker] = True
        return [] if given else self._resumed

    def measure(self, read: Read) -> Waiting:
        """Return a sample with its size.

        Raises:
            MRopeError: the sample has no size, or does not fit into an empty batch; or its tokens
                are not those that it had when a state was saved.
        """
        sample = read.sample
        try:
            if self.size is not None:
                tokens, patches = map(operator.index, self.size(sample))
            else:
                tokens, patches, sample = self._from_columns(sample)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise MRopeError(
                f"{_name(read)} has no size ({error!r}): map Precheck over the stream, "
                f"which adds {LENGTH} and {PATCHES}, or pass size=, a function of a sample that "
                "returns its tokens and patches"
            ) from error
        self._check_fits(read, tokens, patches)
        if read.check not in (-1, tokens % 256):
            raise MRopeError(
                f"cannot resume: {_name(read)} has another length than when the state was saved; "
                "the source changed since the state was saved, or does not yield its samples in "
                "the same order again"
            )
        return Waiting(read.place, sample, tokens, patches)

    def _require_complete(self, found: Sequence[tuple[Mapping[str, Any], int]]) -> None:
        """Check that states are those of all shares of one epoch, and of this source."""
        late = max((one for _, one in found), default=0)
        if late:
            raise MRopeError(
                f"cannot resume: the loader saved its state {late} batches late, which would be "
                "repeated; save with StatefulDataLoader(snapshot_every_n_steps=1)"
            )
        shares = [state["share"] for state, _ in found]
        for name in ("shares", "epoch", "shards"):
            values = sorted({state[name] for state, _ in found})
            if len(values) != 1:
                raise MRopeError(f"cannot resume: the states have {name} {values}, not one number")
        if sorted(shares) != list(range(found[0][0]["shares"])):
            raise MRopeError(
                f"cannot resume: the states are those of shares {sorted(shares)}, not of each of "
                f"{found[0][0]['shares']} (ranks * workers) once; every rank needs those of all"
            )
        self.require_shards(found[0][0]["shards"])

    def require_shards(self, shards: int) -> None:
        """Check that the source has as many shards as when a state was saved.

        Raises:
            MRopeError: it has not.
        """
        if shards != self.shards.count:
            raise MRopeError(
                f"cannot resume: the source had {shards} shards when the state was saved, and has "
                f"{self.shards.count} now"
            )

    def _from_columns(self, sample: Mapping[str, Any]) -> tuple[int, int, dict[str, Any]]:
        tokens = operator.index(sample[LENGTH])
        patches = 0 if self.max_patches is None else operator.index(sample[PATCHES])
        # The collator would pass unknown columns on to the model, which refuses them.
        kept = {name: value for name, value in sample.items() if name not in ADDED}
        return tokens, patches, kept

    def _check_fits(self, read: Read, tokens: int, patches: int) -> None:
        if tokens < 1 or patches < 0:
            raise MRopeError(
                f"{_name(read)} has {tokens} tokens and {patches} patches; a sample "
                "has at least one token"
            )
        for unit, found, most, option in (
            ("tokens", tokens, self.capacity, "max_tokens"),
            ("patches", patches, self.max_patches, "max_patches"),
        ):
            if most is not None and found > most:
                budget = getattr(self, option)
                rounded = "" if most == budget else f", which is {most} before rounding up"
                raise MRopeError(
                    f"{_name(read)} has {found} {unit}, above the budget of "
                    f"{option}={budget}{rounded}; raise {option}, or filter such samples out of "
                    "the source: the stream does not drop any"
                )


class TokenBudgetStreamIterator(Iterator[list[Any]]):
    """Iterate once over the batches of one worker, with a position that can be saved and restored.

    The state holds positions, never samples: resuming reads the samples of the buffer again.
    """

    def __init__(self, stream: TokenBudgetStream) -> None:
        self._stream = stream
        worker = get_worker_info()
        workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        self._share = Share(stream.rank, stream.num_replicas, *workers)
        self._budget_2 = np.array([stream.capacity, stream.max_patches or 0], np.int64)
        self._is_new = True
        self._begin(stream.epoch, [Part(shard) for shard in range(stream.shards.count)])

    def _begin(self, epoch: int, parts: Sequence[Part]) -> None:
        shards = self._stream.shards
        # What is divided already is whole to each worker.
        share = Share(0, 1, 0, 1) if shards.presharded else self._share
        self._start(epoch, deal(parts, share, by_shard=shards.by_shard))

    def _start(self, epoch: int, lanes: Sequence[Lane]) -> None:
        self._epoch = epoch
        self._reader = StreamReader(self._stream.shards, lanes, epoch)
        self._buffer: list[Waiting] = []
        self._batches = 0
        # Samples of a batch, averaged over the last ones.
        self._rate = 0.0

    def __next__(self) -> list[Any]:
        self._resume()
        self._read(self._reads())
        if not self._buffer:
            raise StopIteration
        sizes_B2 = self._sizes()
        if not self._batches:
            fills = (sizes_B2.sum(axis=0) / np.maximum(self._budget_2, 1)).max()
            self._rate = len(self._buffer) / max(float(fills), 1.0)
        chosen = set(
            choose(sizes_B2, self._budget_2, self._stream.max_examples, self._order()).tolist()
        )
        batch = [self._buffer[place].sample for place in sorted(chosen)]
        self._buffer = [one for place, one in enumerate(self._buffer) if place not in chosen]
        self._batches += 1
        self._rate += (len(batch) - self._rate) / _PACE
        self._reader.snapshot_before(self._oldest())
        return batch

    def _resume(self) -> None:
        """Go on from what the stream was told to resume, at the first batch of a pass."""
        # Not at construction: a loader calls `iter` before it restores a state.
        if not self._is_new:
            return
        self._is_new = False
        states = self._stream.take_resumed(self._share.worker)
        if not states:
            return
        if len(states) == self._share.count:
            number = self._share.number
            self.load_state_dict(next(one for one in states if one["share"] == number))
        elif self._stream.presharded:
            raise MRopeError(
                f"cannot resume: the states are those of {len(states)} workers of all ranks, now "
                f"there are {self._share.count}, and presharded=True leaves it to the source what "
                "each reads; resume with as many ranks and workers, or pass the whole source: a "
                "map-style dataset, a datasets stream, or any iterable that yields all samples"
            )
        else:
            self._begin(states[0]["epoch"], what_is_left(states))

    def _reads(self) -> int:
        """Return how many samples to read before the next batch.

        At first 7/8 of the buffer. Then as many as a batch has on average, and slightly more or
        fewer as the buffer is below or above these 7/8: reading exactly what the last batch took
        would follow its swings, from one long sample to many short ones.
        """
        target, waiting = -(-self._stream.buffer_size * 7 // 8), len(self._buffer)
        if not self._batches:
            return target
        steady = round(self._rate + (target - self._rate - waiting) / _PACE)
        return min(max(steady, 1), self._stream.buffer_size - waiting)

    def _read(self, count: int) -> None:
        for _ in range(count):
            read = self._reader.read()
            if read is None:
                return
            self._buffer.append(self._stream.measure(read))

    def _order(self) -> IntArray:
        """Return the order in which samples are taken; the oldest sample is first, always."""
        order_B = np.arange(len(self._buffer), dtype=np.int64)
        if self._stream.shuffle:
            # Drawn from the batch's number, so that the state needs no random generator.
            key = (self._stream.seed, self._epoch, self._share.number, self._batches)
            np.random.default_rng(key).shuffle(order_B[1:])
        return order_B

    def _sizes(self) -> IntArray:
        sizes = [(one.tokens, one.patches) for one in self._buffer]
        sizes_B2 = np.array(sizes, np.int64).reshape(-1, 2)
        if self._stream.max_patches is None:
            sizes_B2[:, 1] = 0
        return sizes_B2

    def _oldest(self) -> Place:
        return self._buffer[0].place if self._buffer else self._reader.place

    def state_dict(self) -> dict[str, Any]:
        """Return the position: plain numbers, and the source's state before the oldest sample."""
        self._resume()
        place, state = self._reader.snapshot_before(self._oldest())
        return {
            "share": self._share.number,
            "shares": self._share.count,
            "shards": self._stream.shards.count,
            "epoch": self._epoch,
            "batches": self._batches,
            "rate": self._rate,
            "lanes": [lane.pack() for lane in self._reader.lanes],
            "ends": list(self._reader.ends),
            "read": self._reader.place[1],
            "waiting": [*_by_lane(self._buffer)],
            "source": [*place, state],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved position, in its epoch: read the samples of the buffer again.

        Raises:
            MRopeError: the state is of another number of ranks or workers, or of another of them;
                or the source no longer yields the same samples at the same positions.
        """
        self._is_new = False
        self._stream.take_resumed(self._share.worker)
        saved = {name: _saved(state_dict, name) for name in self.state_dict()}
        own, theirs = (self._share.number, self._share.count), (saved["share"], saved["shares"])
        if own != theirs:
            raise MRopeError(
                f"cannot resume: the state is that of share {theirs[0]} of {theirs[1]} (rank * "
                f"workers + worker, of ranks * workers), this worker has share {own[0]} of "
                f"{own[1]}; for other ranks or workers pass the states of all ranks to "
                "TokenBudgetStream.resume, and none to the loader"
            )
        self._stream.require_shards(saved["shards"])
        self._start(saved["epoch"], [Lane.unpack(values) for values in saved["lanes"]])
        number, position, source_state = saved["source"]
        self._reader.return_to((number, position), source_state, saved["ends"])
        self._read_again((len(saved["ends"]), saved["read"]), saved["waiting"])
        self._batches, self._rate = saved["batches"], saved["rate"]

    def _read_again(self, stop: Place, waiting: Sequence[tuple[int, list[int], str]]) -> None:
        """Read up to a place, and keep the samples that were waiting in the buffer."""
        checks = {
            (number, position): check
            for number, positions, bytes_of in waiting
            for position, check in zip(positions, bytes.fromhex(bytes_of), strict=True)
        }
        reader = self._reader
        while reader.place < stop and (read := reader.read()) is not None:
            if (check := checks.pop(read.place, None)) is not None:
                self._buffer.append(self._stream.measure(read._replace(check=check)))
        if checks:
            raise MRopeError(
                f"cannot resume: {len(checks)} of the samples that the buffer held are no longer "
                "there; the source changed since the state was saved, or does not yield its "
                "samples in the same order again"
            )


def _by_lane(buffer: Iterable[Waiting]) -> Iterator[list[Any]]:
    """Yield lanes with their waiting positions, and the low byte of the tokens of each."""
    for number, group in groupby(buffer, key=lambda one: one.place[0]):
        ones = list(group)
        yield [
            number,
            [one.place[1] for one in ones],
            bytes(one.tokens % 256 for one in ones).hex(),
        ]


def _warn_of_shuffle_buffer(source: Any) -> None:
    if is_datasets_stream(source) and has_shuffle_buffer(source):
        warnings.warn(
            "the source has a shuffle buffer (IterableDataset.shuffle), which is not part of its "
            "state: resuming reads its shards again from their start; shuffle=True of "
            "TokenBudgetStream needs no such buffer",
            stacklevel=3,
        )


def _name(read: Read) -> str:
    """Return how errors name a sample: by a column that identifies it, and its position."""
    sample = read.sample
    names = NAMES if isinstance(sample, Mapping) else ()
    known = next((f" ({name} {sample[name]})" for name in names if name in sample), "")
    return f"sample {read.place[1]}{known} of those that this worker read"


def _saved(state_dict: Mapping[str, Any], name: str) -> Any:
    if name not in state_dict:
        raise MRopeError(f"not a state of TokenBudgetStream: it has no {name}")
    return state_dict[name]
