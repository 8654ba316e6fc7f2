"""Step 3 of the way: a padded batch becomes one stream of documents, and back.

Shape suffixes: B rows of the batch, S padded length, T tokens of the stream, D documents.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer[Any]]
BoolArray = npt.NDArray[np.bool_]


class Stream(NamedTuple):
    """The valid tokens of a batch, one document after another.

    Attributes:
        tokens_T: token ids of the documents, padding dropped.
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


def to_batch(
    positions_3T: npt.NDArray[np.int64], stream: Stream, shape: tuple[int, int], fill: int
) -> npt.NDArray[np.int64]:
    """Put the positions of a stream back where its tokens stood: (3, B, S), `fill` at padding."""
    if stream.valid_BS is None:
        return positions_3T.reshape(3, *shape)
    out_3BS = np.full((3, *shape), fill, np.int64)
    for axis in range(3):
        # One axis at a time: a 1-D boolean assignment copies whole runs, a 2-D one builds indices.
        out_3BS[axis][stream.valid_BS] = positions_3T[axis]
    return out_3BS
