"""Batch a stream up to token and patch budgets: `TokenBudgetStream`, a torch `IterableDataset`.

Samples are read into a buffer, from which each batch takes the oldest sample, others in order or
at random until one does not fit, and then the best fit for what is left.

Shape suffixes: B samples in the buffer.
"""

from __future__ import annotations

import operator
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from mrope.arrays import as_whole
from mrope.errors import MRopeError
from mrope.prepare.buffer import IntArray, choose
from mrope.prepare.precheck import ADDED, LENGTH, NAMES, PATCHES
from mrope.prepare.ranks import find_rank
from mrope.prepare.stream_reader import StreamReader, has_shuffle_buffer, is_datasets_stream

Size = Callable[[Any], tuple[int, int]]

# Batches over which the number of reads follows the number of samples taken.
_PACE = 32


class Waiting(NamedTuple):
    """A sample in the buffer: its position in the stream, and its tokens and patches."""

    position: int
    sample: Any
    tokens: int
    patches: int


class TokenBudgetStream(IterableDataset[list[Any]]):
    """Fill batches from a stream up to a token budget, and a patch budget if there is one.

    Yields lists of samples: `DataLoader(stream, batch_size=None, collate_fn=MRopeCollator(...))`.

    Args:
        source: a `datasets.IterableDataset`, a torch `IterableDataset`, or any other iterable that
            starts again with every `iter`.
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

    A `datasets.IterableDataset` is divided over ranks by `split_dataset_by_node`, and over workers
    by itself, shard by shard. Of another source, every worker of every rank reads all samples and
    keeps those with `position % (ranks * workers) == rank * workers + worker`.

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
        self.source = _of_rank(source, self.rank, self.num_replicas, self.presharded)
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

    def measure(self, position: int, sample: Any) -> Waiting:
        """Return a sample with its size.

        Raises:
            MRopeError: the sample has no size, or does not fit into an empty batch.
        """
        given = sample
        try:
            if self.size is not None:
                tokens, patches = map(operator.index, self.size(sample))
            else:
                tokens, patches, sample = self._from_columns(sample)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise MRopeError(
                f"{_name(given, position)} has no size ({error!r}): map Precheck over the stream, "
                f"which adds {LENGTH} and {PATCHES}, or pass size=, a function of a sample that "
                "returns its tokens and patches"
            ) from error
        self._check_fits(given, position, tokens, patches)
        return Waiting(position, sample, tokens, patches)

    def _from_columns(self, sample: Mapping[str, Any]) -> tuple[int, int, dict[str, Any]]:
        tokens = operator.index(sample[LENGTH])
        patches = 0 if self.max_patches is None else operator.index(sample[PATCHES])
        # The collator would pass unknown columns on to the model, which refuses them.
        kept = {name: value for name, value in sample.items() if name not in ADDED}
        return tokens, patches, kept

    def _check_fits(self, sample: Any, position: int, tokens: int, patches: int) -> None:
        if tokens < 1 or patches < 0:
            raise MRopeError(
                f"{_name(sample, position)} has {tokens} tokens and {patches} patches; a sample "
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
                    f"{_name(sample, position)} has {found} {unit}, above the budget of "
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
        workers = 1 if worker is None else worker.num_workers
        self._share = stream.rank * workers + (0 if worker is None else worker.id)
        self._shares = stream.num_replicas * workers
        self._budget_2 = np.array([stream.capacity, stream.max_patches or 0], np.int64)
        self._begin(stream.epoch)

    def _begin(self, epoch: int) -> None:
        stream = self._stream
        divided = stream.presharded or is_datasets_stream(stream.source)
        share, shares = (0, 1) if divided else (self._share, self._shares)
        self._epoch = epoch
        self._reader = StreamReader(stream.source, share, shares, epoch)
        self._buffer: list[Waiting] = []
        self._batches = 0
        # Samples of a batch, averaged over the last ones.
        self._rate = 0.0

    def __next__(self) -> list[Any]:
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
            self._buffer.append(self._stream.measure(*read))

    def _order(self) -> IntArray:
        """Return the order in which samples are taken; the oldest sample is first, always."""
        order_B = np.arange(len(self._buffer), dtype=np.int64)
        if self._stream.shuffle:
            # Drawn from the batch's number, so that the state needs no random generator.
            key = (self._stream.seed, self._epoch, self._share, self._batches)
            np.random.default_rng(key).shuffle(order_B[1:])
        return order_B

    def _sizes(self) -> IntArray:
        sizes = [(one.tokens, one.patches) for one in self._buffer]
        sizes_B2 = np.array(sizes, np.int64).reshape(-1, 2)
        if self._stream.max_patches is None:
            sizes_B2[:, 1] = 0
        return sizes_B2

    def _digest(self) -> int:
        # Of tokens alone: patches are not read where they have no budget.
        return zlib.crc32(self._sizes()[:, 0].tobytes())

    def _oldest(self) -> int:
        return self._buffer[0].position if self._buffer else self._reader.position

    def state_dict(self) -> dict[str, Any]:
        """Return the position: plain numbers, and the source's state before the oldest sample."""
        position, state = self._reader.snapshot_before(self._oldest())
        return {
            "share": self._share,
            "shares": self._shares,
            "epoch": self._epoch,
            "batches": self._batches,
            "rate": self._rate,
            "read": self._reader.position,
            "waiting": [one.position for one in self._buffer],
            "digest": self._digest(),
            "source_position": position,
            "source_state": state,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved position, in its epoch: read the samples of the buffer again.

        Raises:
            MRopeError: the state is of another number of ranks or workers, or of another of them;
                or the source no longer yields the same samples at the same positions.
        """
        saved = {name: _saved(state_dict, name) for name in self.state_dict()}
        own, theirs = (self._share, self._shares), (saved["share"], saved["shares"])
        if own != theirs:
            raise MRopeError(
                f"cannot resume: the state is that of share {theirs[0]} of {theirs[1]} (rank * "
                f"workers + worker, of ranks * workers), this worker has share {own[0]} of "
                f"{own[1]}; resume with as many ranks and workers, each rank from its own state"
            )
        self._begin(saved["epoch"])
        self._reader.return_to(saved["source_position"], saved["source_state"])
        self._read_again(saved["read"], set(saved["waiting"]))
        self._batches, self._rate = saved["batches"], saved["rate"]
        if self._digest() != saved["digest"]:
            raise MRopeError(
                f"cannot resume: of the {len(saved['waiting'])} samples that the buffer held, some "
                "have another length, or are no longer there; the source changed since the state "
                "was saved, or does not yield its samples in the same order again"
            )

    def _read_again(self, stop: int, waiting: set[int]) -> None:
        """Read up to position `stop`, and keep the samples that were waiting in the buffer."""
        reader = self._reader
        while reader.position < stop and (read := reader.read()) is not None:
            if read[0] in waiting:
                self._buffer.append(self._stream.measure(*read))


def _of_rank(source: Any, rank: int, ranks: int, presharded: bool) -> Any:
    """Return the source, or a rank's part of it if `datasets` can divide it."""
    if isinstance(source, Iterator):
        raise TypeError(
            f"source must be an iterable that starts again with every iter, not the iterator "
            f"{type(source).__name__}: it could not be resumed, nor be read in a second epoch"
        )
    if not is_datasets_stream(source):
        return source
    if has_shuffle_buffer(source):
        warnings.warn(
            "the source has a shuffle buffer (IterableDataset.shuffle), which is not part of its "
            "state: resuming reads the epoch again from its start; shuffle=True of "
            "TokenBudgetStream needs no such buffer",
            stacklevel=3,
        )
    if presharded:
        return source
    # A second split would divide the rank's own part again, and lose the rest.
    if getattr(source, "_distributed", None) is not None:
        raise MRopeError(
            "the source was already divided by split_dataset_by_node; pass the whole stream, or "
            "presharded=True"
        )
    from datasets.distributed import split_dataset_by_node

    return split_dataset_by_node(source, rank, ranks)


def _name(sample: Any, position: int) -> str:
    """Return how errors name a sample: by a column that identifies it, and its position."""
    names = NAMES if isinstance(sample, Mapping) else ()
    known = next((f" ({name} {sample[name]})" for name in names if name in sample), "")
    return f"sample {position}{known} of those that this worker read"


def _saved(state_dict: Mapping[str, Any], name: str) -> Any:
    if name not in state_dict:
        raise MRopeError(f"not a state of TokenBudgetStream: it has no {name}")
    return state_dict[name]
