"""Input checks, span search and errors for custom rules.

Shape suffixes: B rows of the batch, T tokens of the stream, R runs, V spans of placeholders, G
sizes, I tokens of all blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mrope.arrays import IntArray, run_borders, within
from mrope.errors import SpanMismatchError
from mrope.positions.stream import Stream, documents_of

_NO_SIZE = "a placeholder token that was typed or sampled as text, or a grid that was lost"
_NO_TOKENS = "its tokens were truncated away and its grid was kept, or the grid is another sample's"


class Spans(NamedTuple):
    """Longest stretches of placeholders of one modality, in the order of the stream.

    Attributes:
        modality: "image" or "video".
        start_V: where each starts in the stream.
        length_V: its tokens.
        document_V: the document that it stands in.
    """

    modality: str
    start_V: IntArray
    length_V: IntArray
    document_V: IntArray


def id_dtype(ids_BS: IntArray) -> type[np.signedinteger[Any]]:
    """Return the dtype of positions where the reference takes that of the ids."""
    return np.int32 if ids_BS.dtype == np.int32 else np.int64


def largest(positions_AT: IntArray, stream: Stream) -> IntArray:
    """Return the largest position of each document + 1, (D,)."""
    if not len(stream.start_D):
        return np.empty(0, positions_AT.dtype)
    ends_D: IntArray = np.maximum.reduceat(positions_AT.max(axis=0), stream.start_D) + 1
    return ends_D


def find_spans(stream: Stream, kind_T: npt.NDArray[np.uint8], kind: int, modality: str) -> Spans:
    """Cut out the longest stretches of one kind; none goes beyond a document.

    kinds 0 1 1 | 1 2 with documents at 0 and 3 give, for kind 1, starts 1 3 and lengths 2 1.
    """
    border_R1 = run_borders(kind_T, stream.start_D)
    start_R, length_R = border_R1[:-1], np.diff(border_R1)
    of_kind_R = kind_T[start_R] == kind
    start_V = start_R[of_kind_R]
    return Spans(modality, start_V, length_R[of_kind_R], documents_of(stream, start_V))


def number_cells(first_V: IntArray, cells_V: IntArray) -> tuple[IntArray, IntArray]:
    """Return the tokens of blocks, one block after the other, and each one's number in its block.

    blocks at tokens 3 and 9 of 2 and 3 cells: tokens 3 4 9 10 11, cells 0 1 0 1 2.
    """
    cell_I = within(cells_V)
    return cell_I + first_V.repeat(cells_V), cell_I


def misfit(
    stream: Stream, spans: Spans, span: int, needed: int, size: str, cause: str
) -> SpanMismatchError:
    """Return the error for a span whose tokens are not those that its size needs."""
    document = int(spans.document_V[span])
    row = int(stream.row_D[document])
    ordinal = span - int(spans.document_V.searchsorted(document))
    first = int(spans.start_V[span] - stream.start_D[document])
    found = int(spans.length_V[span])
    return SpanMismatchError(
        f"row {row}, {spans.modality} {ordinal} at valid token {first}: found {found} placeholder "
        f"token{'' if found == 1 else 's'}, but {size}. Likely cause: {cause}.",
        row=row,
        span=ordinal,
        modality=spans.modality,
        found=found,
        needed=needed,
        cause=cause,
    )


def refuse_counts(
    stream: Stream, spans: Spans, needed_G: IntArray, row_G: IntArray | None, what: str
) -> None:
    """Refuse spans that are not as many as their sizes: of each row where rows are known.

    Args:
        needed_G: tokens that each size needs, for the message.
        row_G: the row of the batch that each size belongs to, ascending.
        what: name of the sizes' array.
    """
    row_V = stream.row_D[spans.document_V]
    row = int(stream.row_D[0]) if len(stream.row_D) == 1 else None
    of_V, of_G = slice(0, len(row_V)), slice(0, len(needed_G))
    if row_G is not None:
        rows = int(max(row_V.max(initial=0), row_G.max(initial=0))) + 1
        uneven_B = np.bincount(row_V, minlength=rows) != np.bincount(row_G, minlength=rows)
        row = int(uneven_B.argmax())
        of_V, of_G = (slice(*of.searchsorted((row, row + 1)).tolist()) for of in (row_V, row_G))
    found, sizes = of_V.stop - of_V.start, of_G.stop - of_G.start
    if found != sizes:
        counts = f"{'the batch' if row is None else f'row {row}'} has {found} {spans.modality} "
        counts += f"span{'' if found == 1 else 's'} and {sizes} of {what}"
        if found > sizes:
            surplus = of_V.start + sizes
            raise misfit(stream, spans, surplus, 0, f"there is no size for it: {counts}", _NO_SIZE)
        raise _left_over(spans.modality, row, found, of_G.start + found, needed_G, what, counts)


def _left_over(
    modality: str,
    row: int | None,
    ordinal: int,
    size: int,
    needed_G: IntArray,
    what: str,
    counts: str,
) -> SpanMismatchError:
    """Return the error for the first size that no span asked for."""
    where = f"row {row}, {modality} {ordinal}"
    if row is None:
        where = f"row unknown (give {modality}s_per_sample to check each row on its own)"
    needed = int(needed_G[size])
    return SpanMismatchError(
        f"{where}: found 0 placeholder tokens, but {what}[{size}] needs {needed}: {counts}. "
        f"Likely cause: {_NO_TOKENS}.",
        row=row,
        span=None if row is None else ordinal,
        modality=modality,
        found=0,
        needed=needed,
        cause=_NO_TOKENS,
    )
