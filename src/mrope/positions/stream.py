"""Drop the padding of a batch, and put position ids back where the tokens stood.

A stream is the valid tokens of a batch, one document after another. A document is a row, or one of
the examples that a packed row holds. All that follows works on the stream, so that left, right and
scattered padding are the same to it.

Shape suffixes: B rows of the batch, S padded length, T tokens of the stream, D documents, D1 their
borders (D + 1), V any tokens or spans of the stream, A axes of position ids.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from mrope.arrays import Array, BoolArray, IntArray, borders
from mrope.errors import MRopeError

TEXT, IMAGE, VIDEO = 0, 1, 2
"""Kinds of tokens; the values are those of `mm_token_type_ids`."""


class Stream(NamedTuple):
    """The valid tokens of a batch, one document after another.

    Attributes:
        tokens_T: token ids, padding dropped.
        border_D1: where each document starts in `tokens_T`, and T at the end; no document is empty.
        row_D: the row of the batch that each document came from, ascending.
        valid_BS: which tokens of the batch are in the stream; None where all are.
    """

    tokens_T: IntArray
    border_D1: IntArray
    row_D: IntArray
    valid_BS: BoolArray | None

    @property
    def start_D(self) -> IntArray:
        """Where each document starts in `tokens_T`."""
        return self.border_D1[:-1]

    @property
    def length_D(self) -> IntArray:
        """Tokens of each document."""
        return self.border_D1[1:] - self.border_D1[:-1]


def to_stream(input_ids_BS: IntArray, valid_BS: BoolArray | None) -> Stream:
    """Drop the padding of a batch.

    Rows without a valid token have no document:

        input_ids [[7, 8, 0],     valid [[1, 1, 0],     tokens  [7, 8, 9]
                   [0, 0, 0],            [0, 0, 0],     borders [0, 2, 3]
                   [0, 9, 0]]            [0, 1, 0]]     row     [0, 2]
    """
    rows, width = input_ids_BS.shape
    if valid_BS is None and width > 0:
        border_D1 = np.arange(0, rows * width + 1, width)
        return Stream(input_ids_BS.reshape(-1), border_D1, count_up(rows), None)
    if valid_BS is None:
        valid_BS = np.ones(input_ids_BS.shape, np.bool_)
    length_B = np.count_nonzero(valid_BS, axis=1)
    row_D = length_B.nonzero()[0]
    return Stream(input_ids_BS[valid_BS], borders(length_B[row_D]), row_D, valid_BS)


def split_rows(stream: Stream, seq_lengths: Any, rows: int) -> Stream:
    """Cut rows that hold several examples into a document for each.

    Borders come from lengths and never from positions that restart: two examples of one token each
    have no restart between them.

        borders [0, 5, 7], seq_lengths [[3, 2], [2]]:  borders [0, 3, 5, 7], row [0, 0, 1]

    Args:
        seq_lengths: for each row the tokens of its examples in their order, padding not counted.
        rows: rows of the batch.

    Raises:
        MRopeError: lengths below 1, or lengths that do not add up to the row's valid tokens.
    """
    if len(seq_lengths) != rows:
        raise MRopeError(f"seq_lengths has {len(seq_lengths)} rows, but input_ids {rows}")
    counts_B = np.array([len(lengths) for lengths in seq_lengths], np.int64)
    length_D = np.array(list(chain.from_iterable(seq_lengths)))
    if length_D.size and (length_D.dtype.kind not in "iu" or length_D.min() < 1):
        raise MRopeError(f"seq_lengths must be integers of at least 1, not {list(seq_lengths)}")
    length_D = length_D.astype(np.int64)
    row_D = np.arange(rows).repeat(counts_B)
    given_B = np.bincount(row_D, length_D, rows).astype(np.int64)
    length_B = np.zeros(rows, np.int64)
    length_B[stream.row_D] = stream.length_D
    if not np.array_equal(given_B, length_B):
        row = int((given_B != length_B).argmax())
        raise MRopeError(
            f"row {row}: seq_lengths {list(seq_lengths[row])} add up to {given_B[row]} tokens, but "
            f"the row has {length_B[row]}. Likely cause: truncation after packing"
        )
    return stream._replace(border_D1=borders(length_D), row_D=row_D)


def to_batch(positions_AT: Array, stream: Stream, shape: tuple[int, int], fill: int) -> Array:
    """Put the position ids of a stream back where its tokens stood.

    Args:
        positions_AT: (A, T).
        shape: (B, S) of the batch.
        fill: value at padding.

    Returns:
        (A, B, S): a view of `positions_AT` where the batch has no padding.
    """
    axes = len(positions_AT)
    if stream.valid_BS is None:
        return positions_AT.reshape(axes, *shape)
    out_ABS = np.full((axes, *shape), fill, positions_AT.dtype)
    for axis in range(axes):
        # One axis at a time: a 1-D boolean assignment copies whole runs, a 2-D one builds indices.
        out_ABS[axis][stream.valid_BS] = positions_AT[axis]
    return out_ABS


def documents_of(stream: Stream, token_V: IntArray) -> IntArray:
    """Return the document of each of these tokens, which are given by their place in the stream."""
    document_V: IntArray = stream.start_D.searchsorted(token_V, side="right") - 1
    return document_V


_COUNT = np.arange(1 << 12)


def count_up(n: int) -> IntArray:
    """Return 0, 1, ... n - 1: a read-only view of one array that is kept and grows.

    Two batches of a loader have about the same size; a fresh arange for each is a tenth of the
    kernel's time. What is kept is a third of the largest output at most.
    """
    global _COUNT
    # Threads may collate too: another of them could put a shorter array there meanwhile.
    count = _COUNT
    if n > len(count):
        count = np.arange(n)
        count.flags.writeable = False
        _COUNT = count
    return count[:n]
