"""Compare the number of patches in a batch's pixels with its grids, and take pixels out."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mrope.collate.complete import are_rows
from mrope.collate.samples import axes_of, read_column
from mrope.errors import MRopeError, SpanMismatchError
from mrope.positions.inputs import BatchInputs
from mrope.spec.spec import MRopeSpec

_KINDS = {
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}
# MiniCPM-V joins patches along its last dimension. GLM-Image has grids of images that it is to
# draw, which have no pixels.
_NOT_COMPARED = ("minicpm", "glm_image")
# Grids that a message lists, at most.
_SHOWN = 8

_FEW = "an image or video was dropped, or its pixels cut, after the processor ran"
_MANY = "a grid was lost on the way, or the pixels are another sample's or another processor's"


class _Row(NamedTuple):
    """One row, or the whole batch where rows cannot be told apart.

    Attributes:
        found: patches in its pixels.
        needed: patches that its grids have.
        grids: frames, height and width of each of its grids.
    """

    found: int
    needed: int
    grids: list[list[int]]


def check_pixels(
    spec: MRopeSpec, batch: Mapping[str, Any], examples: Any, inputs: BatchInputs
) -> None:
    """Refuse pixels with another number of patches than their grids have.

    Every row is compared on its own where the examples carry the pixels and the grids of the batch
    in its order; otherwise the sums over the batch are. Only pixels (patches, dim) and (patches,
    channels, height, width) are compared: in other layouts the first dimension may be another one.
    Rows that swapped pixels of equal counts cannot be told apart by their shapes.

    Args:
        inputs: of the batch, whose grids were matched with the tokens.

    Raises:
        SpanMismatchError: `found` and `needed` are patches; `row` is None if it is unknown.
    """
    if spec.family_row.custom_index in _NOT_COMPARED:
        return
    for modality, (pixels, grids) in _KINDS.items():
        found = _patches(pixels, batch.get(pixels))
        if found is None:
            continue
        whole = _row(found, getattr(inputs, grids))
        rows = _rows_of_examples(batch, examples, pixels, grids, whole)
        if rows is None and not whole.grids and len(batch["input_ids"]) > 1:
            continue  # a custom inner function may know their sizes by another name
        rows = rows or [whole]
        for row, counts in enumerate(rows):
            if counts.found != counts.needed:
                known = len(rows) == len(batch["input_ids"])
                raise _mismatch(modality, row if known else None, rows)


def take_pixels(batch: MutableMapping[str, Any], needed: int) -> list[torch.Tensor]:
    """Remove the pixels of images, then of clips, from a batch, and return them, (patches, ...).

    Pixels of each example that the inner collate function left apart stay apart:
    `PaddingCollator(join_pixels=False)`.

    Args:
        needed: patches that the grids of the batch have.

    Raises:
        MRopeError: another number of patches. `check_pixels` says more, and leaves out pixels whose
            sizes may have another name than the grids'.
    """
    parts: list[torch.Tensor] = []
    for name, _ in _KINDS.values():
        pixels = batch.pop(name, None)
        if _are_parts(pixels):
            parts += map(torch.as_tensor, pixels)
        elif pixels is not None:
            parts.append(torch.as_tensor(pixels))
    found = sum(map(len, parts))
    if found != needed:
        raise MRopeError(f"the batch has {found} patches of pixels, but grids of {needed}")
    return parts


def _are_parts(pixels: Any) -> bool:
    """Return whether pixels are a list of tensors or arrays."""
    return isinstance(pixels, (list, tuple)) and bool(pixels) and hasattr(pixels[0], "ndim")


def _row(found: int, grid_N3: npt.NDArray[np.int64]) -> _Row:
    return _Row(found, int(grid_N3.prod(axis=1).sum()), grid_N3.tolist())


def _patches(name: str, pixels: Any) -> int | None:
    """Return the number of patches; None where there are no pixels, or their layout is another."""
    if _are_parts(pixels):
        # Tensors or arrays of whole images, or of single patches; joining them would copy them.
        return sum(map(len, pixels)) if pixels[0].ndim in (2, 4) else len(pixels)
    if pixels is not None and getattr(pixels, "dtype", np.object_) == np.object_:
        pixels = read_column(name, pixels)
    return len(pixels) if pixels is not None and axes_of(pixels) in (2, 4) else None


def _rows_of_examples(
    batch: Mapping[str, Any], examples: Any, pixels: str, grids: str, whole: _Row
) -> list[_Row] | None:
    """Return the counts of each row; None where pixels or grids are not those of the examples."""
    if not are_rows(examples, batch["input_ids"]):
        return None
    rows = []
    for example in examples:
        own = read_column(grids, example.get(grids))
        grid_N3 = np.asarray([] if own is None else own)
        if grid_N3.size and (grid_N3.ndim != 2 or grid_N3.shape[1] != 3):
            return None
        found = _patches(pixels, example.get(pixels)) or 0
        rows.append(_row(found, grid_N3.reshape(-1, 3).astype(np.int64)))
    together = [grid for row in rows for grid in row.grids]
    same = together == whole.grids and sum(row.found for row in rows) == whole.found
    return rows if same else None


def _mismatch(modality: str, row: int | None, rows: list[_Row]) -> SpanMismatchError:
    """Return the error for a row, or for the whole batch if it is None."""
    pixels, grids = _KINDS[modality]
    counts = rows[row or 0]
    where = "the batch, row unknown" if row is None else f"row {row}"
    swapped = [
        other
        for other, its in enumerate(rows)
        if (its.found, its.needed) == (counts.needed, counts.found)
    ]
    cause = _FEW if counts.found < counts.needed else _MANY
    if swapped:
        cause = f"its pixels and those of row {swapped[0]} were swapped"
    shown = f"{counts.grids[:_SHOWN]}"[:-1] + (", ...]" if len(counts.grids) > _SHOWN else "]")
    size = f"{grids} {shown} needs {counts.needed}" if counts.grids else f"there is no {grids}"
    return SpanMismatchError(
        f"{where}: {pixels} has {counts.found} patch{'' if counts.found == 1 else 'es'}, but "
        f"{size}. Likely cause: {cause}.",
        row=row,
        modality=modality,
        found=counts.found,
        needed=counts.needed,
        cause=cause,
    )
