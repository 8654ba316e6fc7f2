"""Read one row of a dataset as the collator would, and count what the model has to do for it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mrope.arrays import Array
from mrope.collate.read import PIXELS, Rows, as_numpy, read_arguments, read_sample
from mrope.collate.values import as_tensor, check_numbers
from mrope.columns import COLUMNS, Columns, NewColumns
from mrope.errors import MRopeError
from mrope.positions.inputs import BatchInputs, check_inputs
from mrope.spec.spec import MRopeSpec


class RowSize(NamedTuple):
    """How much a row has for the model to do.

    Attributes:
        tokens: valid tokens: what a flattened row of it has.
        width: its tokens, padding of its own included: what a padded row of it has at least.
        patches: that the vision tower has to process: frames * height * width of all sizes.
        segments: images, frames of clips and crops, in which patches attend to each other.
        patch_pairs: the sum of their squared patches, which attention in the tower costs.
        longest: patches of the largest of them.
    """

    tokens: int
    width: int
    patches: int
    segments: int
    patch_pairs: int
    longest: int


def batch_of_row(row: Columns) -> NewColumns:
    """Return one row of a dataset as a batch, without padding; pixels stay as they are.

    Raises:
        MRopeError: the row has no tokens, or a token column of several rows; a column that holds
            something else than numbers; as `read_sample`.
    """
    batch = read_sample(row)
    if "input_ids" not in batch:
        raise MRopeError("no input_ids: the column is missing or null")
    for name, value in batch.items():
        kind = COLUMNS[name].kind if name in COLUMNS else None
        if kind == "token":
            batch[name] = _one_row(name, as_numpy(name, value))
        elif kind == "item" or (kind == "patch" and name not in PIXELS):
            batch[name] = as_tensor(name, value)
        elif kind == "row":
            batch[name] = [value]
    return batch


def _one_row(name: str, column: Array) -> Array:
    if column.ndim != 1:
        raise MRopeError(f"{name} must be (n,) or (1, n), not {(*column.shape,)}")
    check_numbers(name, column)
    return column[None].astype(np.int64, copy=False)


class SingleRow(NamedTuple):
    """One row of a dataset, as the collator reads it in a batch.

    Attributes:
        batch: what `batch_of_row` returns.
        rows: of the batch, which it is itself.
        inputs: what its position ids depend on, checked.
    """

    batch: NewColumns
    rows: Rows
    inputs: BatchInputs


def read_row(spec: MRopeSpec, row: Columns) -> SingleRow:
    """Read one row of a dataset.

    Args:
        row: as a dataset holds it, or as `batch_of_row` returns it.

    Raises:
        MRopeError: as `batch_of_row`, `read_arguments` and `check_inputs`.
    """
    batch = batch_of_row(row)
    rows = Rows([batch], batch["input_ids"])
    given = read_arguments(spec, batch, rows, spec.family_row.packs)
    return SingleRow(batch, rows, check_inputs(spec, *given))


def measure(inputs: BatchInputs) -> RowSize:
    """Count the tokens and patches of a row, or of all rows of a batch.

    Args:
        inputs: of the row, or of the batch.
    """
    size_N3 = np.concatenate([inputs.media[modality].size_N3 for modality in ("image", "video")])
    frame_N, height_N, width_N = size_N3.T
    area_N = height_N * width_N
    width = inputs.input_ids.size
    return RowSize(
        tokens=width if inputs.valid is None else int(np.count_nonzero(inputs.valid)),
        width=width,
        patches=int(frame_N @ area_N),
        segments=int(frame_N.sum()),
        patch_pairs=int(frame_N @ area_N**2),
        longest=int(area_N.max(initial=0)),
    )
