"""Check a tokenized dataset before training, and add the lengths that samplers need.

`Precheck` takes batches of columns, as `datasets.Dataset.map(..., batched=True)`,
`datasets.IterableDataset.map` and `ray.data.Dataset.map_batches` pass them to a function.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from mrope.collate.pixels import check_pixels
from mrope.collate.read import PIXELS, read_column
from mrope.collate.single_row import measure, read_row
from mrope.collate.values import axes_of, plain
from mrope.columns import Columns, NewColumns
from mrope.columns import columns as columns_of_kind
from mrope.errors import MRopeError, SpanMismatchError, without_row_0
from mrope.positions.rope_index import compute
from mrope.prepare.columns import columns_of, is_frame, pixel_shape, pixels_of, with_added
from mrope.spec.spec import MRopeSpec
from mrope.towers import VisionSpec

LENGTH, PATCHES = "mrope_length", "mrope_patches"
SEGMENTS, PATCH_PAIRS = "mrope_segments", "mrope_patch_pairs"
ADDED = (LENGTH, PATCHES, SEGMENTS, PATCH_PAIRS)
"""Columns that `Precheck` adds, for samplers; models do not take them."""

_READ = tuple(
    name for name in columns_of_kind("token", "item", "patch", "row", "batch") if name not in PIXELS
)
# Columns that identify a row in an error where `map` does not give its index.
NAMES = ("mrope_index", "index", "id")


class Precheck:
    """Check every row of a batch of columns, and add its length and what its tower has to do.

    Each row is passed to `rope_index` as a batch of one, and must pass all its checks. Four int64
    columns are added:

    - `mrope_length`: valid tokens of the row, the lengths that `TokenBudgetSampler` takes;
    - `mrope_patches`: patches that the vision tower has to process, the sum of frames * height *
      width over the row's grids (height * width over its crops for MiniCPM-V); 0 for text;
    - `mrope_segments`: images and frames of clips (crops), in which patches attend to each other;
    - `mrope_patch_pairs`: the sum of their squared patches, which attention in the tower costs.

    Plain data: it pickles, and needs neither transformers nor the model. Of pixels only the number
    of patches is read.

    Args:
        spec: the model's numbers and the reference to follow.
        vision: the vision tower's numbers, if the collator is given some; checked against the spec.

    Raises:
        TypeError: `spec` is not an `MRopeSpec`.
        MRopeError: `vision` and `spec` merge different numbers of patches.

    Example:
        >>> from mrope.spec.spec import example_config
        >>> spec = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
        >>> columns = Precheck(spec)({
        ...     "input_ids": [[7, 101, 102, 102, 102, 102, 8], [9]],
        ...     "image_grid_thw": [[[1, 4, 4]], None],
        ... })
        >>> columns["mrope_length"].tolist(), columns["mrope_patches"].tolist()
        ([7, 1], [16, 0])
    """

    def __init__(self, spec: MRopeSpec, vision: VisionSpec | None = None) -> None:
        if not isinstance(spec, MRopeSpec):
            raise TypeError(f"spec must be an MRopeSpec, not {type(spec).__name__}")
        if vision is not None and vision.spatial_merge_size != spec.spatial_merge_size:
            raise MRopeError(
                f"the vision tower merges {vision.spatial_merge_size} patches along each side, but "
                f"the spec {spec.spatial_merge_size}: they belong to different models"
            )
        self.spec = spec
        self.vision = vision

    def __call__(self, columns: Any, indices: Sequence[int] | None = None) -> Any:
        """Return `columns` with the four columns of `Precheck`, int64 (rows,).

        Args:
            columns: a mapping from names to lists or arrays with an entry for each row, or a
                `pyarrow.Table`. Read are `input_ids` (n,) and what else of a row the collator
                reads: `attention_mask`, `mm_token_type_ids`, the grids, seconds and `seq_lengths`,
                and the sizes and audio lengths of the families that take them. An entry is null or
                empty where a row has nothing. Of `labels` the length is read, and of pixels the
                number of patches; other columns are not read.
            indices: the rows' indices in the dataset, for errors
                (`datasets.Dataset.map(..., with_indices=True)`).

        Raises:
            SpanMismatchError: placeholder tokens and sizes of a row do not fit together; `row` is
                its index in the dataset if that is known, else in the batch.
            MRopeError: there is no `input_ids`, the columns are those of one row, or a row holds
                something else that `rope_index` refuses.
        """
        # A lazy batch of `datasets` treats columns that were read as written, and casts them.
        source = columns_of(columns) if is_frame(columns) else copy.copy(columns)
        read = {name: source[name] for name in _READ if name in source}
        if "input_ids" not in read:
            raise MRopeError(f"no input_ids among the columns {', '.join(map(str, source))}")
        _refuse_one_row(read["input_ids"])
        read |= pixels_of(columns, PIXELS)
        rows = [self._check(read, row, source, indices) for row in range(len(read["input_ids"]))]
        counts_N4 = np.array(rows, np.int64).reshape(-1, len(ADDED))
        added = {name: counts_N4[:, at].copy() for at, name in enumerate(ADDED)}
        return with_added(columns, added, lists=read)

    def _check(self, read: Columns, row: int, source: Columns, indices: Any) -> tuple[int, ...]:
        """Return what is added for one row; its error names its place in the dataset."""
        try:
            entries = {name: column[row] for name, column in read.items()}
            shapes = {name: pixel_shape(entries[name]) for name in PIXELS if name in entries}
            return _check_row(self.spec, entries | shapes)
        except MRopeError as error:
            raise _of_dataset(error, row, source, indices) from None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec!r}, {self.vision!r})"


def _refuse_one_row(input_ids: Any) -> None:
    """Raise if `map` was called without `batched=True`, and passes one row after another."""
    first = plain(input_ids[0]) if len(input_ids) else None
    if axes_of(first) == 0 and hasattr(first, "__index__"):
        raise MRopeError("input_ids is a row, not a column of rows; call map with batched=True")


def examples_of(columns: Columns) -> list[NewColumns]:
    """Turn a batch of columns into the list of examples that collate functions take.

    Nulls, and columns of the model that hold nothing, are left out of their example, as collate
    functions concatenate over the rows that have the key. Lists of lists become numeric arrays
    where their lengths are equal; read-only arrays are copied.

    Example:
        >>> examples_of({"id": ["a", "b"], "image_grid_thw": [[[1, 4, 4]], None]})
        [{'id': 'a', 'image_grid_thw': [[1, 4, 4]]}, {'id': 'b'}]
    """
    rows = max((len(column) for column in columns.values()), default=0)
    return [
        {
            name: value
            for name, column in columns.items()
            if (value := read_column(name, column[row])) is not None
        }
        for row in range(rows)
    ]


def _check_row(spec: MRopeSpec, row: Columns) -> tuple[int, ...]:
    """Return valid tokens, patches, segments and pairs; raise if a row cannot be collated."""
    batch, rows, inputs = read_row(spec, row)
    compute(spec, inputs)
    check_pixels(spec, batch, rows, inputs)
    size = measure(inputs)
    return size.tokens, size.patches, size.segments, size.patch_pairs


def _of_dataset(
    error: MRopeError, row: int, columns: Columns, indices: Sequence[int] | None
) -> MRopeError:
    """Return the error of a batch of one row as that of a row of the dataset."""
    name = next((name for name in NAMES if name in columns), None)
    place = None if indices is None else int(indices[row])
    if place is not None:
        where = f"row {place} of the dataset"
    elif name is not None:
        where = f"the row with {name} {plain(columns[name][row])}"
    else:
        where = (
            f"row {row} of a batch at an unknown place in the dataset (pass with_indices=True to "
            f"map, or add a column {' or '.join(NAMES)})"
        )
    # The batch's row is always 0 and would mislead; the copy keeps the error's other attributes.
    named = copy.copy(error)
    named.args = (f"{where}: {without_row_0(str(error))}",)
    if isinstance(named, SpanMismatchError):
        named.row = row if place is None else place
    return named
