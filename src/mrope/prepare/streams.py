"""Batch a stream up to token and patch budgets: `TokenBudgetStream`, a torch `IterableDataset`."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset

from mrope.arrays import as_whole
from mrope.columns import Columns, NewColumns
from mrope.errors import MRopeError
from mrope.prepare.lanes import what_is_left
from mrope.prepare.precheck import ADDED, LENGTH, NAMES, PATCHES
from mrope.prepare.ranks import find_rank
from mrope.prepare.saved import find_states
from mrope.prepare.shards import Shards, has_shuffle_buffer, is_datasets_stream
from mrope.prepare.stream_iterator import TokenBudgetStreamIterator, Waiting
from mrope.prepare.stream_reader import Read

Size = Callable[[Any], tuple[int, int]]

# Workers of a rank, at most.
_WORKERS = 4096
# Keys that a state has, and nothing around it.
_KEYS = {"share", "waiting"}


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
        self.shards = Shards(
            source, presharded=self.presharded, rank=self.rank, ranks=self.num_replicas
        )
        _warn_of_shuffle_buffer(source)
        self._resumed: list[Columns] = []
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

    def resume(self, states: Iterable[Columns]) -> None:
        """Let the next pass finish the epoch of saved states, on any number of ranks and workers.

        Args:
            states: those of all workers of all ranks, in any order: of each rank the state of its
                `StatefulDataLoader`, or `state_dict()` of each iterator.

        Raises:
            MRopeError: a state of a worker is missing or there twice; they are of several epochs,
                or of a source with other shards; or a loader saved it some batches late.
        """
        found = [pair for each in states for pair in find_states(each, type(self).__name__, _KEYS)]
        self._require_complete(found)
        states = [state for state, _ in found]
        # At the end of its epoch nothing is left, and the next pass is a whole one.
        self._resumed = states if what_is_left(states) else []
        self._resumed_by.zero_()

    def take_resumed(self, worker: int) -> list[Columns]:
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

    def _require_complete(self, found: Sequence[tuple[Columns, int]]) -> None:
        """Check that states are those of all shares of one epoch, and of this source."""
        late = max((one for _, one in found), default=0)
        if late:
            raise MRopeError(
                f"cannot resume: the loader saved its state {late} batches late, which would be "
                "repeated; save with StatefulDataLoader(snapshot_every_n_steps=1)"
            )
        if not found:
            raise MRopeError("there are no states to resume")
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

    def _from_columns(self, sample: Columns) -> tuple[int, int, NewColumns]:
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


def _warn_of_shuffle_buffer(source: object) -> None:
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
