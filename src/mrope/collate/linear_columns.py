"""Compute what layers of linear attention read of a flattened row: which tokens share a state.

Such a layer carries a state along the row, and has a convolution over a few tokens in front. Both
start anew at each segment. Kernels of flash-linear-attention take the row in chunks of 64 tokens,
given a list of the chunks; without one they ask the device how long each segment is. A rule in
torch alone knows no borders: the segments are laid out for it in rows of one padded call.

Shape suffixes: D segments, the padding of the row included, T tokens of the row, C chunks, E
examples.
"""

from __future__ import annotations

import numpy as np

from mrope.arrays import IntArray, within
from mrope.columns import NewColumns

CHUNK = 64
"""Tokens of a chunk, in flash-linear-attention and in transformers' reference."""

GAP = 8
"""Empty slots between two segments of a row, as many as a convolution looks back, or more."""

_LEAST_WIDTH = 1024
"""Width of the narrowest padded call of fixed shapes, in tokens: one that most examples fit in."""


def linear_columns(length_E: IntArray, tail: int = 0, most: int | None = None) -> NewColumns:
    """Return what linear layers read of a row of these examples.

    Args:
        length_E: tokens of each example.
        tail: tokens of padding behind them, a segment of its own.
        most: how many segments the row has borders for, where shapes are fixed; None: they are not.

    Returns:
        - `linear_places` int32 (1, T): the place of each token in its segment.
        - `linear_chunks` int32 (C, 2): the segment and the number in it of each chunk, as
          flash-linear-attention's `chunk_indices`. With fixed shapes C is the most that a row of
          this width can have, and the chunks that it does not have lie behind the last segment.
        - `linear_slots` int64 (T,): where each token stands in the padded call, whose rows and
          width are `linear_shape`, two ints. A segment begins a chunk, fits in a row, and has `GAP`
          empty slots in front, unless it begins the row. Without fixed shapes the width is that of
          the longest segment; with them 1,024 times a power of two, and the rows have a quarter
          more slots than there are tokens; twice that, or four times, for many short examples.

    Example: segments of 3 and 2 tokens

        places [0 1 2 0 1]    chunks [[0 0] [1 0]]    slots [0 1 2 64 65] of 2 x 64
    """
    length_D: IntArray = np.append(length_E, tail) if tail else length_E
    places_T = within(length_D)
    slots_T: IntArray
    chunks_D = -(-length_D // CHUNK)
    chunks_C2 = np.stack((np.arange(len(length_D)).repeat(chunks_D), within(chunks_D)), 1)
    if most is None:
        start_D, rows, width = _lay_out(length_D, int(chunks_D.max()))
        slots_T = start_D.repeat(length_D) + places_T
    else:
        chunks_C2 = _fill(chunks_C2, len(places_T), most)
        slots_T, rows, width = _lay_out_fixed(length_E, places_T, most)
    return {
        "linear_places": places_T.astype(np.int32)[None],
        "linear_chunks": chunks_C2.astype(np.int32),
        "linear_slots": slots_T.astype(np.int64),
        "linear_shape": [rows, width],
    }


def _lay_out(length_D: IntArray, chunks: int) -> tuple[IntArray, int, int]:
    """Put segments into rows of so many chunks, the longest first, each where it fits first.

    Returns:
        The slot of each segment's first token, the number of rows and their width in tokens.
    """
    taken: list[int] = []  # chunks of each row, with the gap behind its last segment
    start_D = np.empty(len(length_D), np.int64)
    for segment in np.argsort(-length_D, kind="stable").tolist():
        length = int(length_D[segment])
        room = chunks - -(-length // CHUNK)
        row = next((row for row, used in enumerate(taken) if used <= room), len(taken))
        if row == len(taken):
            taken.append(0)
        start_D[segment] = CHUNK * (row * chunks + taken[row])
        taken[row] += -(-(length + GAP) // CHUNK)
    return start_D, len(taken), CHUNK * chunks


def _lay_out_fixed(length_E: IntArray, places_T: IntArray, most: int) -> tuple[IntArray, int, int]:
    """Put examples into rows of a fixed width, and padding into slots that are free.

    Padding is no segment here: it may be longer than every example, and nothing reads its output.

    Args:
        length_E: tokens of each example.
        places_T: places of the tokens, those of the padding last.
        most: how many examples there can be.

    Returns:
        As `_lay_out`, but the slot of each token.
    """
    width = _LEAST_WIDTH
    while width < length_E.max():
        width *= 2
    # The last token of an example, and of its gap, can begin a chunk.
    most_chunks = (len(places_T) + most * (GAP + CHUNK - 1)) // CHUNK
    chunks = min(width // CHUNK, most_chunks)
    start_E, taken, width = _lay_out(length_E, chunks)
    # An example that does not fit into a row has, with what stands there, more chunks than it.
    most_rows = 2 * (most_chunks // (chunks + 1)) + 1
    # Most batches need less: a quarter more slots than tokens. Those of short examples, which have
    # a chunk each, get twice that, or four times: rows that are empty take as long as others.
    rows = -(-5 * len(places_T) // (4 * width)) + 1
    while rows < taken:
        rows *= 2
    rows = min(rows, most_rows)
    tokens = int(length_E.sum())
    slots_T = np.empty(len(places_T), np.int64)
    slots_T[:tokens] = start_E.repeat(length_E) + places_T[:tokens]
    free = np.ones(rows * width, bool)
    free[slots_T[:tokens]] = False
    free[start_E[:, None] - np.arange(1, GAP + 1)] = False
    slots_T[tokens:] = np.flatnonzero(free)[: len(places_T) - tokens]
    return slots_T, rows, width


def _fill(chunks_C2: IntArray, width: int, most: int) -> IntArray:
    """Add chunks up to the most that a row has; kernels find no token of the segment in them."""
    filled = np.empty((width // CHUNK + most, 2), chunks_C2.dtype)
    filled[:] = (chunks_C2[-1, 0], -(-width // CHUNK))
    filled[: len(chunks_C2)] = chunks_C2
    return filled
