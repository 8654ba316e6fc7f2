"""Compare the number of patches in a batch's pixels with its grids, and take pixels out."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mrope.collate.read import Rows
from mrope.collate.samples import PIXELS, axes_of, read_column
from mrope.columns import COLUMNS
from mrope.errors import MRopeError, SpanMismatchError
from mrope.positions.inputs import BatchInputs, Media
from mrope.spec.spec import MRopeSpec

# Sizes of towers whose pixels are not compared: MiniCPM-V joins patches along its last dimension,
# GLM-Image has grids of images that it is to draw, which have no pixels.
_NOT_COMPARED = ("crops", "without_last")
# Grids that a message lists, at most.
_SHOWN = 8

_FEW = "an image or video was dropped, or its pixels cut, after the processor ran"
_MANY = "a grid was lost on the way, or the pixels are another sample's or another processor's"


class _Part(NamedTuple):
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
    spec: MRopeSpec, batch: Mapping[str, Any], rows: Rows, inputs: BatchInputs
) -> None:
    """Refuse pixels with another number of patches than their grids have.

    Every row is compared on its own where the examples carry the pixels and the grids of the batch
    in its order; otherwise the sums over the batch are. Only pixels (patches, dim) and (patches,
    channels, height, width) are compared: in other layouts the first dimension may be another one.
    Rows that swapped pixels of equal counts cannot be told apart by their shapes.

    Args:
        rows: of the batch.
        inputs: of the batch, whose grids were matched with the tokens.

    Raises:
        SpanMismatchError: `found` and `needed` are patches; `row` is None if it is unknown.
    """
    tower = spec.family_row.tower
    if tower is not None and tower.sizes in _NOT_COMPARED:
        return
    for name in PIXELS:
        found = _patches(name, batch.get(name))
        if found is None:
            continue
        media = inputs.of(str(COLUMNS[name].modality))
        parts = _of_rows(name, rows, media, found)
        if parts is None and not len(media.size_N3) and inputs.shape[0] > 1:
            continue  # a custom inner function may know their sizes by another name
        known = parts is not None or inputs.shape[0] == 1
        parts = parts or [_part(found, media.size_N3)]
        for row, counts in enumerate(parts):
            if counts.found != counts.needed:
                raise _mismatch(name, row if known else None, parts)


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
    for name in PIXELS:
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


def _part(found: int, size_N3: npt.NDArray[np.int64]) -> _Part:
    return _Part(found, int(size_N3.prod(axis=1).sum()), size_N3.tolist())


def _patches(name: str, pixels: Any) -> int | None:
    """Return the number of patches; None where there are no pixels, or their layout is another."""
    if _are_parts(pixels):
        # Tensors or arrays of whole images, or of single patches; joining them would copy them.
        return sum(map(len, pixels)) if pixels[0].ndim in (2, 4) else len(pixels)
    if pixels is not None and getattr(pixels, "dtype", np.object_) == np.object_:
        pixels = read_column(name, pixels)
    return len(pixels) if pixels is not None and axes_of(pixels) in (2, 4) else None


def _of_rows(name: str, rows: Rows, media: Media, found: int) -> list[_Part] | None:
    """Return the counts of each row; None where pixels or grids are not those of the examples."""
    if rows.examples is None:
        return None
    patches = [_patches(name, example.get(name)) or 0 for example in rows.examples]
    if sum(patches) != found or (media.count_B is None and len(media.size_N3)):
        return None
    counts = np.zeros(len(patches), np.int64) if media.count_B is None else media.count_B
    sizes = np.split(media.size_N3, counts.cumsum()[:-1])
    return [_part(*of_row) for of_row in zip(patches, sizes, strict=True)]


def _mismatch(pixels: str, row: int | None, parts: list[_Part]) -> SpanMismatchError:
    """Return the error for a row, or for the whole batch if it is None."""
    grids, modality = PIXELS[pixels][0], COLUMNS[pixels].modality
    counts = parts[row or 0]
    where = "the batch, row unknown" if row is None else f"row {row}"
    swapped = [
        other
        for other, its in enumerate(parts)
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
