"""Step 3 of the way: a padded batch becomes one stream of documents, and back.

Shape suffixes: B rows of the batch, S padded length, T tokens of the stream, D documents.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mrope.arrays import BoolArray, IntArray
from mrope.errors import MRopeError

TEXT, IMAGE, VIDEO = 0, 1, 2
"""Kind of a token; the values are those of `mm_token_type_ids`."""


class Stream(NamedTuple):
    """The valid tokens of a batch, one document after another.

    Attributes:
        tokens_T: token ids of the documents, padding dropped. A document is a row of the batch, or
            one of the examples that a packed row holds.
        start_D: where each document starts in `tokens_T`, ascending; no document is empty.
        length_D: tokens of each document.
        row_D: the row of the batch that each document came from.
        valid_BS: which tokens of the batch are in the stream; None where all are.
    """

    tokens_T: IntArray
    start_D: IntArray
    length_D: IntArray
    row_D: IntArray
    valid_BS: BoolArray | None


def to_stream(input_ids_BS: IntArray, valid_BS: BoolArray | None) -> Stream:
    """Drop the padding of a batch.

    Padding may stand left, right or in between; rows without a valid token have no document:

        input_ids [[7, 8, 0],     valid [[1, 1, 0],     tokens [7, 8, 9]
                   [0, 0, 0],            [0, 0, 0],     start  [0, 2]
                   [0, 9, 0]]            [0, 1, 0]]     row    [0, 2]
    """
    rows, width = input_ids_BS.shape
    if valid_BS is None and width > 0:
        row_D = np.arange(rows)
        return Stream(input_ids_BS.ravel(), row_D * width, np.full(rows, width), row_D, None)
    if valid_BS is None:
        valid_BS = np.ones(input_ids_BS.shape, np.bool_)
    length_B = np.count_nonzero(valid_BS, axis=1)
    row_D = length_B.nonzero()[0]
    length_D = length_B[row_D]
    return Stream(input_ids_BS[valid_BS], length_D.cumsum() - length_D, length_D, row_D, valid_BS)


def split_rows(stream: Stream, seq_lengths: Any, rows: int) -> Stream:
    """Cut rows that hold several examples into a document for each; borders come from lengths.

        lengths of documents [5, 2], seq_lengths [[3, 2], [2]]:  lengths [3, 2, 2], row [0, 0, 1]

    Args:
        seq_lengths: for each row the tokens of its examples in their order, padding not counted.
        rows: rows of the batch.

    Raises:
        MRopeError: lengths below 1, or lengths that are not those of a row.
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
    start_D = length_D.cumsum() - length_D
    return stream._replace(start_D=start_D, length_D=length_D, row_D=row_D)


def to_batch(
    positions_AT: npt.NDArray[Any], stream: Stream, shape: tuple[int, int], fill: int
) -> npt.NDArray[Any]:
    """Put the positions of a stream back where its tokens stood: (A, B, S), `fill` at padding."""
    axes = len(positions_AT)
    if stream.valid_BS is None:
        return positions_AT.reshape(axes, *shape)
    out_ABS = np.full((axes, *shape), fill, positions_AT.dtype)
    for axis in range(axes):
        # One axis at a time: a 1-D boolean assignment copies whole runs, a 2-D one builds indices.
        out_ABS[axis][stream.valid_BS] = positions_AT[axis]
    return out_ABS
