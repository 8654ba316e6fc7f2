"""Record a digest of every batch, so that two runs can be compared: `DigestCollator`.

Digests are taken in the worker, of what a row was made into: token ids, position ids, and sizes of
images, clips and audios.

Shape suffixes: B rows, S padded length, R rows of positions.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import get_worker_info

from mrope.arrays import Array
from mrope.collate.collator import Collate
from mrope.collate.process_files import append_record, process_file, require_writable
from mrope.columns import COLUMNS, Columns, NewColumns


class BatchDigest(NamedTuple):
    """What one batch was.

    Attributes:
        rows: of each row, or example of a flattened row, 24 hex digits: 16 of its token ids, and 8
            of its position ids. Padding is left out, so that a row has one digest in all batches.
        items: for each column with sizes of images, clips or audios, or with seconds, 8 hex digits
            of each of these.
        shape: of `input_ids`, padding included.
    """

    rows: tuple[str, ...]
    items: Mapping[str, tuple[str, ...]]
    shape: tuple[int, ...]


class DigestCollator:
    """Collate, and record a digest of every batch.

    Args:
        collate: makes the batches.
        to: path from which each process derives the name of its own file, as for
            `SkipBad(rejects=...)`, with a line for every batch; or a function that is called with a
            `BatchDigest` in the process that collates.

    Raises:
        OSError: the folder of the path cannot be made or written to, or it is a folder itself.

    Example:
        >>> found = []
        >>> collate = DigestCollator(lambda rows: {"input_ids": torch.tensor(rows)}, found.append)
        >>> _ = collate([[7, 8], [7, 9]])
        >>> len(found[0].rows), found[0].shape
        (2, (2, 2))
    """

    def __init__(
        self, collate: Collate, to: str | os.PathLike[str] | Callable[[BatchDigest], Any]
    ) -> None:
        self.collate = collate
        self.to = to if callable(to) else Path(to).absolute()
        if isinstance(self.to, Path):
            require_writable(self.to)
        # Of all workers that this process starts: epochs of one run, against a restart.
        self._run = secrets.token_hex(4)
        self._own: tuple[int, Path] | None = None

    def __getstate__(self) -> NewColumns:
        return {**self.__dict__, "_own": None}

    def __call__(self, examples: object) -> Any:
        """Return the batch of `examples` unchanged, once its digest is recorded."""
        batch = self.collate(examples)
        digest = digest_batch(batch)
        if not isinstance(self.to, Path):
            self.to(digest)
            return batch
        # Opened for each line: workers are killed without a chance to flush or close a file.
        with self._file(self.to).open("ab") as file:
            file.write(json.dumps(digest, separators=(",", ":")).encode() + b"\n")
        return batch

    def _file(self, path: Path) -> Path:
        """Return the file of this process, which begins with a line about the process."""
        # Workers are forked: compare the process id at every call.
        if self._own is None or self._own[0] != os.getpid():
            self._own = os.getpid(), process_file(path)
            worker = get_worker_info()
            append_record(
                self._own[1],
                {"run": self._run, "workers": 1 if worker is None else worker.num_workers},
            )
        return self._own[1]


def digest_batch(batch: Columns) -> BatchDigest:
    """Return the digest of a batch as `MRopeCollator` returns it."""
    ids_BS, positions_RBS = batch["input_ids"].numpy(), _positions(batch)
    rows = tuple(
        _digest(ids_BS[row, where], 8) + _digest(positions_RBS[:, row, where], 4)
        for row, where in _places(batch)
    )
    items = {
        name: tuple(_digest(item, 4) for item in batch[name].numpy())
        for name in sorted(batch)
        if _has_sizes(name) and isinstance(batch[name], torch.Tensor) and batch[name].ndim
    }
    return BatchDigest(rows, items, ids_BS.shape)


def _has_sizes(name: str) -> bool:
    known = COLUMNS.get(name)
    # With fixed shapes the grids of images and clips are one derived column.
    return name.endswith("_grid_thw") or (known is not None and known.means is not None)


def _places(batch: Columns) -> Iterator[tuple[int, Any]]:
    """Yield the row of each example, and which of the row's tokens are the example's."""
    borders = batch.get("cu_seq_lens_q")
    if borders is not None:
        edges = borders.tolist()
        # Borders of a rung that no example needs are empty.
        yield from (
            (0, slice(start, stop)) for start, stop in itertools.pairwise(edges) if start < stop
        )
        return
    shape, mask = batch["input_ids"].shape, batch.get("attention_mask")
    # A mask of pairs of tokens says nothing of padding.
    if mask is None or mask.shape != shape:
        mask = torch.ones(shape)
    yield from enumerate(mask.numpy().astype(bool))


def _positions(batch: Columns) -> Array:
    """Return the positions of a batch, (R, B, S); R is 0 if it has none."""
    found = batch.get("position_ids")
    if found is None:
        return np.empty((0, *batch["input_ids"].shape), np.int64)
    positions: Array = found.numpy()
    if positions.ndim == 2:
        return positions[None]
    return positions.swapaxes(0, 1) if "batch_first" in batch else positions


def _digest(values: Array, size: int) -> str:
    """Return `size` bytes in hex; an int32 and an int64 of the same value have the same."""
    if values.dtype.kind in "iub":
        values = values.astype(np.int64, copy=False)
    return hashlib.blake2b(np.ascontiguousarray(values).data, digest_size=size).hexdigest()
