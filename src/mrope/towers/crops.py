"""Compute the index tensors of MiniCPM-V's tower from the sizes of the crops.

Crops are thumbnails and slices of images and frames. Their patches stand side by side, in raster
order within each crop.

Source: `MiniCPMV4_7VisionModel`, and `transformers.vision_utils`, transformers 5.24.

Shape suffixes: N crops, P patches of all crops, L patches along an axis.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mrope.towers.vision import block_index, frame_borders, window_order

Int64Array = npt.NDArray[np.int64]

# Patches along each side of a window, and of what the merger makes a token of.
_SIDE = 2


def crop_tensors(
    side: int, size_N2: npt.ArrayLike, merges_windows: bool
) -> dict[str, npt.NDArray[Any] | int]:
    """Compute what the tower and the merger behind it derive from the sizes.

    Args:
        side: learned positions along each side of the tower's table.
        size_N2: (N, 2) height and width of each crop in patches, multiples of 2, and of 4 with
            `merges_windows`.
        merges_windows: whether the tower merges windows of 2 x 2 patches within its layers, as it
            does unless `downsample_mode` is "4x".

    Returns:
        - `cu_seqlens` int32 (N + 1,), `max_seqlen` int: the crops, in patches.
        - `position_ids` int64 (P,): the learned position of each patch.
        - with `merges_windows`: `window_index` int64 (P,), patches in the order of windows,
          `cu_window_seqlens` int32 (windows + 1,) and `max_window_seqlen` int.
        - `block_index` int64: the order in which the merger takes what the tower returns.

    Example:
        >>> tensors = crop_tensors(4, [[2, 4]], False)
        >>> tensors["position_ids"].tolist(), tensors["block_index"].tolist()
        ([0, 1, 2, 3, 8, 9, 10, 11], [0, 1, 4, 5, 2, 3, 6, 7])
    """
    sizes = np.asarray(size_N2, np.int64)
    grid_N3 = np.concatenate((np.ones_like(sizes[:, :1]), sizes), axis=1)
    tensors: dict[str, npt.NDArray[Any] | int] = {
        "cu_seqlens": frame_borders(grid_N3),
        "max_seqlen": int(sizes.prod(axis=1).max()),
        "position_ids": np.concatenate([_nearest(side, *size) for size in sizes.tolist()]),
    }
    if merges_windows:
        order_P, borders = window_order(grid_N3, 1, _SIDE)
        tensors["window_index"], tensors["cu_window_seqlens"] = order_P, borders
        tensors["max_window_seqlen"] = _SIDE**2
        # A window is one place of what the tower returns.
        grid_N3[:, 1:] //= _SIDE
    tensors["block_index"] = block_index(grid_N3, _SIDE)
    return tensors


def _nearest(side: int, height: int, width: int) -> Int64Array:
    rows_L, columns_L = (_buckets(side, length) for length in (height, width))
    return (rows_L[:, None] * side + columns_L).ravel()


@lru_cache(maxsize=1024)
def _buckets(side: int, length: int) -> Int64Array:
    """Return the learned row or column that is nearest to each of `length` patches, (L,)."""
    # torch's own borders: they are compared for equality, and other sums would round differently.
    borders = torch.arange(1 / side, 1.0, 1 / side).numpy()
    place_L = np.arange(length, dtype=np.float32) / np.float32(length)
    bucket_L: Int64Array = np.searchsorted(borders, place_L, side="right")
    return bucket_L
