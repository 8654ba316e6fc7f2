"""Compute what layers of linear attention read of a flattened row: which tokens share a state.

Such a layer carries a state along the row, and has a convolution over a few tokens in front. Both
start anew at each segment. Kernels of flash-linear-attention take the row in chunks of 64 tokens,
given a list of the chunks; without one they ask the device how long each segment is. The reference
of transformers knows no borders: the segments are laid out for it as rows of one padded call.

Shape suffixes: D segments, the padding of the row included, T tokens of the row, C chunks.
"""

from __future__ import annotations

import numpy as np

from mrope.arrays import IntArray
from mrope.columns import NewColumns

CHUNK = 64
"""Tokens of a chunk, in flash-linear-attention and in the reference of transformers."""


def linear_columns(length_D: IntArray, most: int | None = None) -> NewColumns:
    """Return what linear layers read of a row of these segments.

    Args:
        length_D: tokens of each segment.
        most: how many segments the row has borders for, where shapes are fixed; None: they are not.

    Returns:
        - `linear_places` int32 (1, T): the place of each token in its segment.
        - `linear_chunks` int32 (C, 2): the segment and the number in it of each chunk, as
          flash-linear-attention's `chunk_indices`. With fixed shapes C is the most that a row of
          this width can have, and the chunks that it does not have lie behind the last segment.
        - `linear_slots` int64 (T,): where each token stands in the padded call, whose rows and
          width are `linear_shape`, two ints. Each segment is a row. With fixed shapes all are in
          one row: each begins a chunk, behind padding that ends the state before.

    Example: segments of 3 and 2 tokens

        places [0 1 2 0 1]    chunks [[0 0] [1 0]]    slots [0 1 2 3 4] of 2 x 3
    """
    places_T = _count(length_D)
    segment_T = np.arange(len(length_D)).repeat(length_D)
    chunks_D = -(-length_D // CHUNK)
    chunks_C2 = np.stack((np.arange(len(length_D)).repeat(chunks_D), _count(chunks_D)), 1)
    if most is None:
        shape = [len(length_D), int(length_D.max())]
        slots_T = segment_T * shape[1] + places_T
    else:
        # A padding token at least stands between two segments.
        taken_D = length_D // CHUNK + 1
        shape = [1, CHUNK * (len(places_T) // CHUNK + most)]
        slots_T = (CHUNK * (taken_D.cumsum() - taken_D)).repeat(length_D) + places_T
        chunks_C2 = _fill(chunks_C2, len(places_T), most)
    return {
        "linear_places": places_T.astype(np.int32)[None],
        "linear_chunks": chunks_C2.astype(np.int32),
        "linear_slots": slots_T.astype(np.int64),
        "linear_shape": shape,
    }


def _count(length_D: IntArray) -> IntArray:
    """Count each group of a length from 0: 3 and 2 give 0 1 2 0 1."""
    start_D = length_D.cumsum() - length_D
    counted: IntArray = np.arange(int(length_D.sum())) - start_D.repeat(length_D)
    return counted


def _fill(chunks_C2: IntArray, width: int, most: int) -> IntArray:
    """Add chunks up to the most that a row has; kernels find no token of the segment in them."""
    filled = np.empty((width // CHUNK + most, 2), chunks_C2.dtype)
    filled[:] = (chunks_C2[-1, 0], -(-width // CHUNK))
    filled[: len(chunks_C2)] = chunks_C2
    return filled
