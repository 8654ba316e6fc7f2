"""Make the batches of one worker of a `TokenBudgetStream`.

Samples are read into a buffer, from which each batch takes the oldest sample, others in order or
at random until one does not fit, and then the best fit for what is left.

Shape suffixes: B samples in the buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch.utils.data import get_worker_info

from mrope.columns import Columns, NewColumns
from mrope.errors import MRopeError
from mrope.prepare.buffer import IntArray, choose
from mrope.prepare.lanes import Lane, Part, Share, deal, what_is_left
from mrope.prepare.stream_reader import Place, StreamReader

if TYPE_CHECKING:
    from mrope.prepare.streams import TokenBudgetStream

# Batches over which the number of reads follows the number of samples taken.
_PACE = 32


class Waiting(NamedTuple):
    """A sample in the buffer: where it was read, and its tokens and patches."""

    place: Place
    sample: Any
    tokens: int
    patches: int


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
        share = Share(0, 1, 0, 1) if shards.divides_itself else self._share
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
        elif why := self._stream.shards.divides_itself:
            raise MRopeError(
                f"cannot resume: the states are those of {len(states)} workers of all ranks, now "
                f"there are {self._share.count}, and {why} what each reads; resume with as many "
                "ranks and workers, or pass a source that can be divided anew: a map-style "
                "dataset, a datasets stream without these steps, or any iterable of all samples"
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

    def state_dict(self) -> NewColumns:
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

    def load_state_dict(self, state_dict: Columns) -> None:
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


def _saved(state_dict: Columns, name: str) -> Any:
    if name not in state_dict:
        raise MRopeError(f"not a state of TokenBudgetStream: it has no {name}")
    return state_dict[name]
