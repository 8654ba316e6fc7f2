"""VideoLLaMA 3: tokens are counted over the batch, and numbered in 1-D.

Its processors merge images and videos by sizes of their own, which stand in the batch and not in
the config, and leave out the tokens of a video that hardly differ from those of the frame before:
what a frame's grid needs is known only for the whole batch.

Source: `VideoLlama3Model.forward`, and its processors, transformers 5.24.

Shape suffixes: B rows of the batch, S padded length, N grids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mrope.errors import MRopeError, SpanMismatchError
from mrope.positions.inputs import BatchInputs
from mrope.positions.located import Located
from mrope.positions.stream import IMAGE, VIDEO
from mrope.spec.spec import MRopeSpec

Array = npt.NDArray[Any]

_CAUSE = "truncation, or sizes or a mask of another batch"


def counted_index(_spec: MRopeSpec, located: Located) -> tuple[Array, Array]:
    """Compute position ids int64 (B, S), 0, 1, 2 ..., and deltas (B, 1), all 0.

    Args:
        located: the batch, with `image_merge_sizes` and `video_merge_sizes` (N,), and for videos
            `video_compression_mask`, bool (tokens,), which of them are kept; None: all are.

    Raises:
        SpanMismatchError: more or fewer placeholders than features.
        MRopeError: merge sizes that are missing, differ, or do not divide a grid.
    """
    for modality, kind in (("image", IMAGE), ("video", VIDEO)):
        found = int(np.count_nonzero(located.kind_T == kind))
        needed = _features(located.inputs, modality)
        if found != needed:
            raise SpanMismatchError(
                f"the batch, row unknown: {found} {modality} tokens, but its grids need {needed}. "
                f"Likely cause: {_CAUSE}.",
                modality=modality,
                found=found,
                needed=needed,
                cause=_CAUSE,
            )
    rows, width = located.inputs.shape
    return np.tile(np.arange(width), (rows, 1)), np.zeros((rows, 1), np.int64)


def merge_size(inputs: BatchInputs, modality: str) -> int:
    """Return the one size by which all images, or all videos, of a batch are merged.

    Raises:
        MRopeError: there is none, or more than one.
    """
    name = f"{modality}_merge_sizes"
    sizes = np.unique(np.asarray(getattr(inputs, name) if _has(inputs, name) else ()))
    if len(sizes) != 1 or sizes[0] < 1:
        raise MRopeError(
            f"{name} must hold one size, the same for every {modality}, not {sizes.tolist()}"
        )
    return int(sizes[0])


def _has(inputs: BatchInputs, name: str) -> bool:
    return getattr(inputs, name) is not None


def _features(inputs: BatchInputs, modality: str) -> int:
    grid_N3 = getattr(inputs, f"{modality}_grid_thw")
    if not len(grid_N3):
        return 0
    merge = merge_size(inputs, modality)
    if (grid_N3 < 1).any() or (grid_N3[:, 1:] % merge).any():
        raise MRopeError(
            f"{modality}_grid_thw: sizes must be at least 1, height and width multiples of the "
            f"merge size, {merge}"
        )
    features = int(grid_N3.prod(axis=1).sum()) // merge**2
    if modality == "image" or inputs.video_compression_mask is None:
        return features
    kept = np.asarray(inputs.video_compression_mask)
    if kept.shape != (features,):
        raise MRopeError(
            f"video_compression_mask has shape {kept.shape}, but the grids have {features} tokens"
        )
    return int(np.count_nonzero(kept))
