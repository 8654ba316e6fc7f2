"""Sources of a stream, as shards whose samples have the same positions for every reader."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset

from mrope.errors import MRopeError
from mrope.prepare.lanes import Snapshot

# Steps of a `datasets` stream that count samples: divided, they count in each part. An endless
# `repeat` of one shard would never come to the next.
_COUNTING = ("RepeatExamplesIterable", "SkipExamplesIterable", "TakeExamplesIterable")


class Shards:
    """Open the shards of a source.

    A map-style source is one shard, of which only the samples asked for are read. A source with
    `num_shards` and `shard(num_shards=..., index=...)`, such as a `datasets.IterableDataset`, is
    read shard by shard. Any other iterable is one shard, which every worker reads.

    Args:
        source: an iterable that starts again with every `iter`, or a map-style dataset.
        presharded: the source itself knows what the worker that iterates over it reads.
        rank, ranks: this rank, for a `datasets` stream that divides itself.

    Raises:
        TypeError: the source is an iterator.
        MRopeError: the source was already divided by `split_dataset_by_node`.

    Attributes:
        by_shard: whether there may be several shards.
        count: their number.
        divides_itself: why the source decides what each worker reads; an empty string if it does
            not.
    """

    def __init__(self, source: Any, *, presharded: bool, rank: int, ranks: int) -> None:
        if isinstance(source, Iterator):
            raise TypeError(
                f"source must be an iterable that starts again with every iter, not the iterator "
                f"{type(source).__name__}: it could not be resumed, nor be read in a second epoch"
            )
        # A second split would divide the rank's own part again, and lose the rest.
        is_stream = is_datasets_stream(source)
        if is_stream and not presharded and getattr(source, "_distributed", None) is not None:
            raise MRopeError(
                "the source was already divided by split_dataset_by_node; pass the whole stream, "
                "or presharded=True"
            )
        self.divides_itself = "presharded=True leaves it to the source" if presharded else ""
        if is_stream and not presharded and _has_step(source, *_COUNTING):
            self.divides_itself = "a datasets stream with repeat, skip or take decides"
            source = _split(source, rank, ranks)
        self.by_shard = not self.divides_itself and _has_shards(source)
        self._by_index = not self.divides_itself and _is_map_style(source)
        self.count = int(source.num_shards) if self.by_shard else 1
        self._source = source

    def open(self, shard: int, epoch: int, snapshot: Snapshot) -> ShardPass:
        """Begin to read a shard, at a snapshot if the source can return to it."""
        if self._by_index:
            return _IndexedPass(self._source)
        source = self._of_shard(shard)
        if hasattr(source, "set_epoch"):
            # Before the state: `datasets` ignores a state of another epoch without a word.
            source.set_epoch(epoch)
        return ShardPass(source, snapshot, in_worker=bool(self.divides_itself))

    def _of_shard(self, shard: int) -> Any:
        if is_datasets_stream(self._source):
            return _split(self._source, *((shard, self.count) if self.by_shard else (0, 1)))
        if self.by_shard:
            return self._source.shard(num_shards=self.count, index=shard)
        return self._source


class ShardPass:
    """Read one shard in order, and count.

    Attributes:
        position: of the next sample.
    """

    def __init__(self, source: object, snapshot: Snapshot, *, in_worker: bool) -> None:
        iterator = _rows_of(source, in_worker=in_worker)
        self._holder = _state_holder(source, iterator)
        self.position, state = snapshot
        if state is None or self._holder is None:
            self.position = 0
        else:
            self._holder.load_state_dict(copy.deepcopy(state))
            if self._holder is source:
                iterator = _rows_of(source, in_worker=in_worker)
        self._iterator = iterator

    def jump(self, position: int) -> None:
        """Go to a later position, if nothing has to be read on the way."""

    def read(self) -> Any:
        """Return the next sample.

        Raises:
            StopIteration: the shard has no more; `position` is then the number of its samples.
        """
        sample = next(self._iterator)
        self.position += 1
        return sample

    def snapshot(self) -> Snapshot | None:
        """Return the place of the next sample; None if the source has no state."""
        if self._holder is None:
            return None
        # Copied, since a source may return the dict that it goes on changing.
        return self.position, copy.deepcopy(self._holder.state_dict())


class _IndexedPass(ShardPass):
    """Read the samples of a map-style source that are asked for, and no others."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self._holder = None
        self.position = 0

    def jump(self, position: int) -> None:
        self.position = min(position, len(self._source))

    def read(self) -> Any:
        if self.position == len(self._source):
            raise StopIteration
        self.position += 1
        return self._source[self.position - 1]


def is_datasets_stream(source: object) -> bool:
    """Whether a source is a `datasets.IterableDataset`, without importing that library."""
    library = sys.modules.get("datasets")
    return library is not None and isinstance(source, library.IterableDataset)


def has_shuffle_buffer(source: object) -> bool:
    """Whether a `datasets` stream has a shuffle buffer, whose samples its state leaves out."""
    return _has_step(source, "BufferShuffledExamplesIterable")


def _has_step(source: object, *names: str) -> bool:
    # No public attribute tells; a release that renames these turns a test red.
    steps = [getattr(source, "_ex_iterable", None)]
    while steps:
        step = steps.pop()
        if type(step).__name__ in names:
            return True
        steps += [*getattr(step, "ex_iterables", ()), getattr(step, "ex_iterable", None)]
        steps = [one for one in steps if one is not None]
    return False


def _split(stream: object, rank: int, ranks: int) -> Any:
    """Return a part of a `datasets` stream as an object of its own.

    A stream keeps a state that was loaded once, and starts every later pass from there. Its epoch
    is shared by all workers, and set by adding a difference: two workers at the same time add it
    twice, and shuffle the shards as in another epoch.
    """
    from datasets.distributed import split_dataset_by_node

    # By node, not by `shard`: the epoch's order of shards is applied before.
    return split_dataset_by_node(stream, rank, ranks)


def _has_shards(source: object) -> bool:
    return not _is_map_style(source) and hasattr(source, "num_shards") and hasattr(source, "shard")


def _is_map_style(source: object) -> bool:
    # torch's IterableDataset inherits a `__getitem__` that raises; a mapping iterates over keys.
    both = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    return both and not isinstance(source, IterableDataset | Mapping)


def _rows_of(source: Any, *, in_worker: bool) -> Iterator[Any]:
    """Iterate over a source; over a shard of a `datasets` stream whichever worker reads it."""
    if in_worker or not is_datasets_stream(source):
        return iter(source)
    return _without_workers(source)


def _without_workers(stream: Any) -> Iterator[Any]:
    # In a DataLoader worker `iter(stream)` would divide the shard again, and draw shuffle buffers
    # by the worker's number. `iter` of batches does neither; a batch of a table format is a table.
    for batch in stream.iter(batch_size=1):
        if isinstance(batch, dict):
            yield {name: column[0] for name, column in batch.items()}
        else:
            yield batch


def _state_holder(source: object, iterator: object) -> Any:
    """Return what saves the position: the iterator, else the source, else None."""
    if has_shuffle_buffer(source):
        return None
    for one in (iterator, source):
        if hasattr(one, "state_dict") and hasattr(one, "load_state_dict"):
            return one
    return None
