"""Compare the number of patches in a batch's pixels with its grids, and take pixels out."""

from __future__ import annotations

from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from mrope.arrays import as_array
from mrope.collate.read import PIXELS, Rows, read_column
from mrope.collate.values import axes_of
from mrope.columns import COLUMNS, Batch, Columns, columns
from mrope.errors import MRopeError, SpanMismatchError
from mrope.positions.inputs import BatchInputs, Media
from mrope.spec.spec import MRopeSpec

# Sizes of towers whose pixels are not compared: MiniCPM-V joins patches along its last dimension,
# GLM-Image has grids of images that it is to draw, which have no pixels.
_NOT_COMPARED = ("crops", "without_last")
_MASK, *_ = columns("item", modality="audio", means="mask")
_FEATURES, *_ = (name for name in columns("item", modality="audio") if COLUMNS[name].means is None)
_MODALITY = {name: str(COLUMNS[name].modality) for name in PIXELS}
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


def check_pixels(spec: MRopeSpec, batch: Columns, rows: Rows, inputs: BatchInputs) -> None:
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
    if batch.get(_MASK) is not None and batch.get(_FEATURES) is not None:
        _check_features(batch, rows)
    for name, modality in _MODALITY.items():
        pixels = batch.get(name)
        found = None if pixels is None else _patches(name, pixels)
        if found is None:
            continue
        media, count = inputs.media[modality], inputs.shape[0]
        needed_N = media.size_N3[:, 0] * media.size_N3[:, 1] * media.size_N3[:, 2]
        found_B = None
        if rows.examples is not None and (media.count_B is not None or not len(needed_N)):
            found_B = [_patches(name, example.get(name)) or 0 for example in rows.examples]
        if found_B is None or sum(found_B) != found:
            # A custom inner function may know their sizes by another name.
            if found != np.add.reduce(needed_N) and (len(needed_N) or count == 1):
                raise _mismatch(name, media, [found], None if count > 1 else 0)
            continue
        counts = [0] * count if media.count_B is None else media.count_B.tolist()
        needed = iter(needed_N.tolist())
        for row, (grids, found) in enumerate(zip(counts, found_B, strict=True)):
            if sum(islice(needed, grids)) != found:
                raise _mismatch(name, media, found_B, row)


def _check_features(batch: Columns, rows: Rows) -> None:
    """Refuse features of audios of another number or length than their masks have.

    A row that lost its features would take those of the next one.
    """
    masks, features = rows.of(_MASK), rows.of(_FEATURES)
    together = [(batch[_MASK], batch[_FEATURES])]
    known = masks is not None and features is not None
    pairs = list(zip(masks, features, strict=True)) if masks and features and known else together
    for row, (mask, feature) in enumerate(pairs):
        needed, found = _shape(_MASK, mask), _shape(_FEATURES, feature)
        if (found[:1], found[-1:]) == (needed[:1], needed[-1:]):
            continue
        cause = "an audio was dropped, or features and masks are of other samples"
        raise SpanMismatchError(
            f"{f'row {row}' if known else 'the batch, row unknown'}: {_FEATURES} has shape "
            f"{(*found,)}, but {_MASK} {(*needed,)}: audios and mel frames differ. Likely cause: "
            f"{cause}.",
            row=row if known else None,
            modality="audio",
            found=sum(found[:1]),
            needed=sum(needed[:1]),
            cause=cause,
        )


def _shape(name: str, value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value.shape if hasattr(value, "shape") else as_array(name, value, "numbers").shape)


def take_pixels(batch: Batch, needed: int) -> list[torch.Tensor]:
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


def _are_parts(pixels: object) -> bool:
    """Return whether pixels are a list of tensors or arrays."""
    return isinstance(pixels, (list, tuple)) and bool(pixels) and hasattr(pixels[0], "ndim")


def _patches(name: str, pixels: Any) -> int | None:
    """Return the number of patches; None where there are no pixels, or their layout is another."""
    if isinstance(pixels, torch.Tensor):
        return pixels.shape[0] if pixels.ndim in (2, 4) else None
    if _are_parts(pixels):
        # Tensors or arrays of whole images, or of single patches; joining them would copy them.
        return sum(map(len, pixels)) if pixels[0].ndim in (2, 4) else len(pixels)
    if pixels is not None and getattr(pixels, "dtype", np.object_) == np.object_:
        pixels = read_column(name, pixels)
    return len(pixels) if pixels is not None and axes_of(pixels) in (2, 4) else None


def _mismatch(name: str, media: Media, found_B: list[int], row: int | None) -> SpanMismatchError:
    """Return the error for a row, or for the whole batch if it is None.

    Args:
        found_B: patches of pixels in each row, or in the batch.
    """
    grids, modality = PIXELS[name][0], _MODALITY[name]
    parts = [media.size_N3]
    if len(found_B) > 1 and media.count_B is not None:
        parts = np.split(media.size_N3, media.count_B.cumsum()[:-1])
    parts += [media.size_N3[:0]] * (len(found_B) - len(parts))
    rows = [
        _Part(found, int(part.prod(axis=1).sum()), part.tolist())
        for found, part in zip(found_B, parts, strict=True)
    ]
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
        f"{where}: {name} has {counts.found} patch{'' if counts.found == 1 else 'es'}, but "
        f"{size}. Likely cause: {cause}.",
        row=row,
        modality=modality,
        found=counts.found,
        needed=counts.needed,
        cause=cause,
    )
