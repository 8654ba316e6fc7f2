"""Ahead of time: check a whole dataset once, and store with each sample where its spans sit.

The stage works on batches of columns, as `datasets.Dataset.map(stage, batched=True)`,
`datasets.IterableDataset.map` and `ray.data.Dataset.map_batches` hand them over. What it writes and
how the collator reads it is in `mrope.positions.stored`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mrope.arrays import as_array
from mrope.errors import MRopeError, SpanMismatchError
from mrope.positions.rope_index import locate
from mrope.positions.stored import LENGTH, SPANS, STAMP, StoredSpans, stamp_of, to_stored
from mrope.prepare.columns import columns_of, is_table, plain, with_added
from mrope.spec.spec import MRopeSpec
from mrope.towers.vision import VisionSpec

_TOKENS = ("input_ids", "attention_mask", "mm_token_type_ids")
_GRIDS = ("image_grid_thw", "video_grid_thw")
_SECONDS = ("second_per_grid_ts", "video_second_per_grid")
_PACKED = "seq_lengths"
_READ = (*_TOKENS, *_GRIDS, *_SECONDS, _PACKED)
# Columns that say which row of its dataset a row is, where `map` does not.
_NAMES = ("mrope_index", "index", "id")
# A row that has none of these must not have the key: its neighbours' are merged without it.
_LEFT_OUT_IF_EMPTY = (*_GRIDS, *_SECONDS, "pixel_values", "pixel_values_videos")


class Precheck:
    """Check every row of a batch of columns, and add columns that say where its spans sit.

    Three columns are added: `mrope_spans`, an int64 list with five numbers for each image, clip or
    frame (see `mrope.positions.stored.FIELDS`); `mrope_length`, the row's valid tokens; `mrope_spec`, the
    spec in words. `MRopeCollator` takes them out of the examples, refuses those of another spec and
    of samples that were changed since, and makes the same batch as without them.

    Plain data: it pickles, and runs without transformers.

    Args:
        spec: the model's numbers and the reference to follow.
        vision: the tower's numbers, if the collator is given some: they must go with the spec's.

    Raises:
        TypeError: `spec` is no `MRopeSpec`.
        MRopeError: a family that is not numbered by spans, or towers of another model.

    Example:
        >>> from mrope.spec.spec import example_config
        >>> spec = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
        >>> stage = Precheck(spec)
        >>> columns = {
        ...     "input_ids": [[7, 101, 102, 102, 102, 102, 8], [9]],
        ...     "image_grid_thw": [[[1, 4, 4]], None],
        ... }
        >>> stored = stage(columns)
        >>> [spans.tolist() for spans in stored["mrope_spans"]], stored["mrope_length"].tolist()
        ([[1, 2, 1, 2, 2], []], [7, 1])
    """

    def __init__(self, spec: MRopeSpec, vision: VisionSpec | None = None) -> None:
        if not isinstance(spec, MRopeSpec):
            raise TypeError(f"spec must be an MRopeSpec, not {type(spec).__name__}")
        if spec.family_row.custom_index is not None:
            raise MRopeError(
                f"{spec.family} has a rule of its own and no spans to store; leave Precheck "
                "out, and the collator numbers its batches"
            )
        if vision is not None and vision.spatial_merge_size != spec.spatial_merge_size:
            raise MRopeError(
                f"the tower merges {vision.spatial_merge_size} patches along each side, but the "
                f"spec {spec.spatial_merge_size}: they are of two models"
            )
        self.spec = spec
        self.vision = vision

    def __call__(self, columns: Any, indices: Sequence[int] | None = None) -> Any:
        """Return `columns` with three more.

        Args:
            columns: a mapping from names to lists or arrays with an entry for each row, or a
                `pyarrow.Table`: `input_ids`, and what else of a sample the collator numbers by:
                `attention_mask`, the grids, the seconds, `mm_token_type_ids`, `seq_lengths`. An
                entry is null or empty where a row has nothing. Other columns are not read.
            indices: the rows' places in the dataset, to name bad rows by
                (`datasets.Dataset.map(..., with_indices=True)`).

        Raises:
            MRopeError: no `input_ids`, or a row that cannot be numbered.
        """
        # What is read of a lazy batch counts as written, and is then cast and copied.
        source = columns_of(columns) if is_table(columns) else copy.copy(columns)
        read = {name: source[name] for name in _READ if name in source}
        if "input_ids" not in read:
            raise MRopeError(f"no input_ids among the columns {', '.join(map(str, source))}")
        rows = [self._store(read, row, source, indices) for row in range(len(read["input_ids"]))]
        added = {
            # Arrays, since a batch in which no row has a span would leave the type of a list open.
            SPANS: [stored.table_5V.T.ravel() for stored in rows],
            LENGTH: np.array([int(stored.length_B[0]) for stored in rows], np.int64),
            STAMP: [stamp_of(self.spec)] * len(rows),
        }
        return with_added(columns, added, lists=read)

    def _store(
        self, read: Mapping[str, Any], row: int, source: Mapping[str, Any], indices: Any
    ) -> StoredSpans:
        """Return the spans of one row, or raise what is wrong with it, by the row's name."""
        try:
            return _find(self.spec, {name: plain(column[row]) for name, column in read.items()})
        except MRopeError as error:
            raise _of_row(error, row, source, indices) from None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec!r}, {self.vision!r})"


def examples_of(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Turn a batch of columns into the list of examples that collate functions take.

    Nulls, and grids, seconds and pixels of length 0, are left out of their example. Arrays are
    numeric and writable; what was neither is copied.

    Example:
        >>> examples_of({"id": ["a", "b"], "image_grid_thw": [[[1, 4, 4]], None]})
        [{'id': 'a', 'image_grid_thw': [[1, 4, 4]]}, {'id': 'b'}]
    """
    rows = max((len(column) for column in columns.values()), default=0)
    return [
        {
            name: value
            for name, column in columns.items()
            if (value := plain(column[row])) is not None
            and not (name in _LEFT_OUT_IF_EMPTY and len(value) == 0)
        }
        for row in range(rows)
    ]


def _find(spec: MRopeSpec, sample: Mapping[str, Any]) -> StoredSpans:
    """Return the spans of a sample, as of a batch that has no other."""
    if sample["input_ids"] is None:
        raise MRopeError("no input_ids: the entry is null")
    lengths = sample.get(_PACKED)
    arguments: dict[str, Any] = {name: _as_row(name, sample.get(name)) for name in _TOKENS}
    arguments |= {name: _as_grids(name, sample.get(name)) for name in _GRIDS}
    arguments["second_per_grid_ts"] = _seconds(sample)
    arguments["seq_lengths"] = None if lengths is None else [np.ravel(lengths)]
    found = locate(spec, **arguments)
    return to_stored(found.stream, found.runs, found.grids, rows=1)


def _as_row(name: str, column: Any) -> npt.NDArray[Any] | None:
    """Return the token column of a sample, (n,) or (1, n), as that of a batch of one row."""
    if column is None:
        return None
    array = as_array(name, column, "a number for each token")
    if array.ndim == 1:
        return array[None]
    if array.ndim != 2 or len(array) != 1:
        raise MRopeError(f"{name} must be (n,) or (1, n), not {array.shape}")
    return array


def _as_grids(name: str, grids: Any) -> npt.NDArray[Any] | None:
    """Return the grids of a sample; one grid alone may come as (3,)."""
    if grids is None:
        return None
    array = as_array(name, grids, "frames, height and width in patches")
    return array[None] if array.shape == (3,) else array


def _seconds(values: Mapping[str, Any]) -> Any:
    given = {name: values[name] for name in _SECONDS if values.get(name) is not None}
    if len(given) == 2 and not np.array_equal(*given.values()):
        raise MRopeError(f"{' and '.join(given)} are both there and differ")
    return next(iter(given.values()), None)


def _of_row(
    error: MRopeError, row: int, columns: Mapping[str, Any], indices: Sequence[int] | None
) -> MRopeError:
    """Return an error of a batch of one row as that of a row of the dataset."""
    name = next((name for name in _NAMES if name in columns), None)
    place = None if indices is None else int(indices[row])
    if place is not None:
        where = f"row {place} of the dataset"
    elif name is not None:
        where = f"the row with {name} {plain(columns[name][row])}"
    else:
        where = (
            f"row {row} of a batch whose place in the dataset is not known (with_indices=True, or "
            f"a column {' or '.join(_NAMES)}, tells it)"
        )
    named = copy.copy(error)
    named.args = (f"{where}: {str(error).removeprefix('row 0, ').removeprefix('row 0: ')}",)
    if isinstance(named, SpanMismatchError):
        named.row = row if place is None else place
    return named
