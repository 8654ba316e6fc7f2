"""The rows of a training run: columns as they are, or conversations that workers prepare.

Workers import this module when they unpickle the dataset, so that it imports nothing heavier than
torch at its top.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mrope.arrays import IntArray
from mrope.collate.padding import PaddingCollator
from mrope.collate.read import PIXELS
from mrope.collate.single_row import RowSize
from mrope.collate.skip_bad import INDEX
from mrope.columns import Columns, NewColumns, columns
from mrope.errors import MRopeError
from mrope.positions.spans import token_types
from mrope.training.naming import naming_row
from mrope.training.sizes import Sizes, as_sizes, count_columns, read_sizes, write_sizes

if TYPE_CHECKING:
    import datasets

    from mrope.spec.spec import MRopeSpec
    from mrope.training.conversations import Conversations

FAILED = "mrope_failed"
"""Key under which a row that cannot be prepared carries its error to the collate function."""

# Fewer are counted here: to start workers takes longer.
_MANY = 20_000
_UNCOUNTED, _ONE_TOKEN = RowSize(-1, 0, 0, 0, 0, 0), RowSize(1, 1, 0, 0, 0, 0)


class Rows(Dataset[dict[str, Any]]):
    """Rows of a table; one that cannot be prepared comes as its index and its error.

    Args:
        table: rows of columns that a model takes, or of conversations.
        spec: of the model.
        conversations: prepares rows of conversations; None: the rows are columns.
        sizes_file: where counts of all rows are kept; None: nowhere.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        spec: MRopeSpec,
        conversations: Conversations | None = None,
        sizes_file: Path | None = None,
    ) -> None:
        # The format is applied when a row is read, in the worker; the table stays memory-mapped.
        # Of conversations "arrow", which decodes nothing: not pictures, whose bytes and paths are
        # read, and not what else a feature holds, which `_conversation` does.
        self.table = table.with_format("torch" if conversations is None else "arrow")
        self.features = None if conversations is None else _without_pictures(table.features)
        names = [name for name in table.column_names if name not in PIXELS]
        self.counted = table.select_columns(names).with_format("numpy")
        self.spec = spec
        self.conversations = conversations
        self.sizes_file = sizes_file

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> NewColumns:
        try:
            return self.prepare(index)
        except MRopeError as error:
            return {FAILED: error, INDEX: index}

    def prepare(self, index: int) -> NewColumns:
        """Return a row as the collate function takes it, or raise an `MRopeError` that names it."""
        if self.conversations is not None:
            return self.conversations.prepare(self._conversation(index), index)
        with naming_row(index):
            return self._columns(self.table[index])

    def _columns(self, row: NewColumns) -> NewColumns:
        if self.spec.family_row.timed:
            _warn_of_missing_seconds(row)
        if row.get("mm_token_type_ids") is None and row.get("input_ids") is not None:
            # Without it transformers' own forward raises, or falls back to 1-D positions.
            ids = np.asarray(row["input_ids"])
            row["mm_token_type_ids"] = torch.from_numpy(token_types(self.spec, ids))
        return row

    def count(self, index: int) -> RowSize:
        """Return the size of a row without preparing it, or raise an `MRopeError` that names it."""
        if self.conversations is not None:
            return self.conversations.count(self._conversation(index), index)
        with naming_row(index):
            return count_columns(self.spec, self.counted[index])

    def _conversation(self, index: int) -> NewColumns:
        with naming_row(index):
            row: NewColumns = self.table[index].to_pylist()[0]
            assert self.features is not None
            decoded: NewColumns = self.features.decode_example(row)
        return decoded

    def sizes(self, workers: int = 0, skip: bool = False) -> Sizes:
        """Return the sizes of all rows, and keep them in `sizes_file`.

        Args:
            workers: processes that count, if there are many rows.
            skip: count a row that cannot be counted as one token: the collate function rejects it.

        Raises:
            MRopeError: a row cannot be counted, without `skip`.
        """
        file = self.sizes_file
        table_NF = None if file is None else read_sizes(file, len(self))
        if table_NF is None:
            table_NF = self._count_all(workers)
            if file is not None:
                write_sizes(file, table_NF)
        bad_N = table_NF[:, 0] < 0
        if bad_N.any() and not skip:
            self.count(int(bad_N.argmax()))  # raises the row's own error
        table_NF[bad_N] = _ONE_TOKEN
        return as_sizes(table_NF)

    def _count_all(self, workers: int) -> IntArray:
        batches: Any = DataLoader(
            range(len(self)),  # type: ignore[arg-type]
            batch_size=64,
            num_workers=workers if len(self) >= _MANY else 0,
            collate_fn=self._count_some,
        )
        return np.array([size for batch in batches for size in batch], np.int64)

    def _count_some(self, indices: Sequence[int]) -> list[RowSize]:
        return [self._count_or_not(index) for index in indices]

    def _count_or_not(self, index: int) -> RowSize:
        try:
            return self.count(index)
        except MRopeError:
            return _UNCOUNTED


def _without_pictures(features: datasets.Features) -> datasets.Features:
    """Return the features of a table, of which pictures stay bytes and paths."""
    import datasets

    def undecoded(feature: object) -> Any:
        if isinstance(feature, datasets.Image):
            return datasets.Image(decode=False)
        if isinstance(feature, datasets.List):
            return datasets.List(undecoded(feature.feature), length=feature.length)
        if isinstance(feature, dict):
            return {name: undecoded(one) for name, one in feature.items()}
        return feature

    return datasets.Features(undecoded(dict(features)))


def start_worker(own: Callable[[int], Any] | None, number: int) -> None:
    """Let a worker outlive Ctrl-C, which a terminal sends to it too: its process saves first.

    `own` is what the loader calls in a worker besides, with the worker's `number`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if own is not None:
        own(number)


class PadRows(PaddingCollator):
    """A `PaddingCollator` that raises the error of a row that could not be prepared."""

    def __call__(self, examples: Sequence[Columns]) -> NewColumns:
        """Return the padded batch of `examples`, or raise the first such row's `MRopeError`."""
        for example in examples:
            if FAILED in example:
                raise example[FAILED]
        return super().__call__(examples)


def count_example(spec: MRopeSpec, example: Columns) -> tuple[int, int]:
    """Return tokens and patches of a prepared row; one that failed counts as a token."""
    size = _ONE_TOKEN if FAILED in example else count_columns(spec, example)
    return size.tokens, size.patches


_SECONDS = tuple(columns("item", means="seconds"))
_warned = False


def _warn_of_missing_seconds(row: Columns) -> None:
    """Warn, once in a process, of a clip whose seconds nobody knows."""
    global _warned
    clips = row.get("video_grid_thw")
    has_clips = isinstance(clips, torch.Tensor) and clips.ndim > 0 and len(clips) > 0
    if has_clips and not _warned and all(_is_null(row.get(name)) for name in _SECONDS):
        _warned = True
        warnings.warn(
            f"a row has clips but no {_SECONDS[0]}: one second a step is assumed, which is right "
            "only for clips of two frames a second or so",
            UserWarning,
            stacklevel=2,
        )


def _is_null(value: object) -> bool:
    return value is None or bool(torch.as_tensor(value).double().isnan().all())
