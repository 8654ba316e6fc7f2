"""Compute the index tensors of MiniCPM-V's tower from the sizes of the crops.

Crops are thumbnails and slices of images and frames. Their patches stand side by side, in raster
order within each crop.

Source: `MiniCPMV4_7VisionModel`, and `transformers.vision_utils`, transformers 5.24.

Shape suffixes: N crops, P patches of all crops, L patches along an axis.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from mrope.towers.vision import block_index

Int64Array = npt.NDArray[np.int64]

SIDE = 2
"""Patches along each side of a window, and of what the merger makes a token of."""


def merges_windows(merge: int) -> bool:
    """Whether the tower merges windows within its layers: it does unless tokens are 2 x 2 patches.

    Args:
        merge: patches along each side that share a token, 2 or 4.
    """
    return merge == SIDE**2


def nearest_positions(side: int, size_N3: Int64Array) -> Int64Array:
    """Compute the learned position that is nearest to each patch, int64 (P,).

    Args:
        side: learned positions along each side of the tower's table.

    Example:
        >>> nearest_positions(4, np.array([[1, 2, 4]])).tolist()
        [0, 1, 2, 3, 8, 9, 10, 11]
    """
    parts = []
    for height, width in size_N3[:, 1:].tolist():
        rows_L, columns_L = _buckets(side, height), _buckets(side, width)
        parts.append((rows_L[:, None] * side + columns_L).ravel())
    return np.concatenate(parts)


def crop_block_index(size_N3: Int64Array, merge: int) -> Int64Array:
    """Compute the order in which the merger takes what the tower returns, int64.

    Example:
        >>> crop_block_index(np.array([[1, 2, 4]]), 2).tolist()
        [0, 1, 4, 5, 2, 3, 6, 7]
    """
    # A merged window is one place of what the tower returns.
    places_N3 = size_N3 // [1, SIDE, SIDE] if merges_windows(merge) else size_N3
    return block_index(places_N3, SIDE)


@lru_cache(maxsize=1024)
def _buckets(side: int, length: int) -> Int64Array:
    """Return the learned row or column that is nearest to each of `length` patches, (L,)."""
    # torch's own borders: they are compared for equality, and other sums would round differently.
    borders = torch.arange(1 / side, 1.0, 1 / side).numpy()
    place_L = np.arange(length, dtype=np.float32) / np.float32(length)
    bucket_L: Int64Array = np.searchsorted(borders, place_L, side="right")
    return bucket_L
