"""Step 4 of the way: where each image, clip or frame sits. Every malformed sample is caught here.

Shape suffixes: T tokens of the stream, D documents, R runs (text runs and vision spans), V vision
spans, G the grids of `mrope.grids`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mrope.documents import BoolArray, IntArray, Stream
from mrope.families import MRopeSpec
from mrope.grids import Grids
from mrope.mismatch import IMAGE, TEXT, VIDEO, mismatch, missing_start, type_mismatch


class Runs(NamedTuple):
    """A stream cut into runs, each either text or one vision span; they cover every token.

    Attributes:
        start_R, length_R: where a run starts in the stream, and its tokens.
        first_D: the first run of each document.
        vision_V: which of the runs are vision spans, ascending.
        grid_V: for each span its column of `Grids.size_3G`.
        text_T: True where a token is text.
    """

    start_R: IntArray
    length_R: IntArray
    first_D: IntArray
    vision_V: IntArray
    grid_V: IntArray
    text_T: BoolArray


def find_runs(
    spec: MRopeSpec, stream: Stream, grids: Grids, types_T: IntArray | None = None
) -> Runs:
    """Cut a stream into text runs and vision spans, and give every span its grid.

    A run is a longest stretch of tokens of one kind within a document. As a rule it is one span;
    where images stand side by side, their tokens are one run and the grids say where to cut it.

    Args:
        types_T: `mm_token_type_ids` of the stream, if the batch has them.

    Raises:
        SpanMismatchError: tokens, types and grids do not fit together.
    """
    tokens = len(stream.tokens_T)
    kind_T = _token_kinds(spec, stream.tokens_T)
    if types_T is not None and not np.array_equal(kind_T, types_T):
        raise type_mismatch(stream, kind_T, types_T)
    start_R = _run_starts(kind_T, stream.start_D)
    kind_R = kind_T[start_R]
    length_R = lengths(start_R, tokens)
    vision_V = kind_R.nonzero()[0]
    if spec.rule.start_required:
        _require_starts(spec, stream, start_R[vision_V], kind_R[vision_V])
    grid_V = _match_one_to_one(length_R[vision_V], kind_R[vision_V], grids)
    if grid_V is None:
        cut = _cut_by_grids(start_R, length_R, kind_R, grids)
        if cut is None:
            raise mismatch(stream, start_R, length_R, kind_R, grids)
        start_R, vision_V, grid_V = cut
        length_R = lengths(start_R, tokens)
    runs = Runs(
        start_R, length_R, start_R.searchsorted(stream.start_D), vision_V, grid_V, kind_T == TEXT
    )
    if grids.row_G is not None and not _rows_agree(stream, runs, grids.row_G):
        whole_R = _run_starts(kind_T, stream.start_D)
        raise mismatch(stream, whole_R, lengths(whole_R, tokens), kind_R, grids)
    return runs


def _token_kinds(spec: MRopeSpec, tokens_T: IntArray) -> npt.NDArray[np.uint8]:
    """Return TEXT, IMAGE or VIDEO for each token."""
    kind_T = (tokens_T == spec.video_token_id).view(np.uint8)
    np.add(kind_T, kind_T, out=kind_T)
    kind_T |= (tokens_T == spec.image_token_id).view(np.uint8)
    return kind_T


def _run_starts(kind_T: npt.NDArray[np.uint8], start_D: IntArray) -> IntArray:
    """Return where the kind changes or a document begins.

    kinds 0 0 1 1 | 1 0 with documents at 0 and 4 start runs at 0, 2, 4 and 5.
    """
    change_T = np.empty(len(kind_T), np.bool_)
    np.not_equal(kind_T[1:], kind_T[:-1], out=change_T[1:])
    change_T[start_D] = True
    return change_T.nonzero()[0]


def lengths(start_R: IntArray, tokens: int) -> IntArray:
    length_R = np.empty_like(start_R)
    np.subtract(start_R[1:], start_R[:-1], out=length_R[:-1])
    length_R[-1:] = tokens - start_R[-1:]
    return length_R


def _match_one_to_one(length_V: IntArray, kind_V: IntArray, grids: Grids) -> IntArray | None:
    """Return each run's grid where every run is exactly one span, the usual case, else None."""
    videos = np.count_nonzero(kind_V == VIDEO)
    if len(kind_V) != grids.size_3G.shape[1] or len(kind_V) - videos != grids.images:
        return None
    # Grids stand images first: the k-th image run takes column k, the k-th video run images + k.
    # kinds [1, 2, 1] sort to runs [0, 2, 1]; so run 0 has column 0, run 2 column 1, run 1 column 2.
    grid_V = np.empty(len(kind_V), np.int64)
    grid_V[kind_V.argsort(kind="stable")] = np.arange(len(kind_V))
    fits = length_V == grids.size_3G.prod(axis=0)[grid_V]
    return grid_V if fits.all() else None


def _cut_by_grids(
    start_R: IntArray, length_R: IntArray, kind_R: IntArray, grids: Grids
) -> tuple[IntArray, IntArray, IntArray] | None:
    """Cut runs of adjacent images or frames by their grids; None where that does not come out.

    A run of 6 tokens and grids of 2 and 4 tokens: the grids start at placeholders 0 and 2, both lie
    within the run, and all 6 tokens are used; the spans start at the run's start and 2 tokens on.
    """
    need_G = grids.size_3G.prod(axis=0)
    starts = [start_R[kind_R == TEXT]]
    columns = [np.full(len(starts[0]), -1)]
    for kind, part in ((IMAGE, slice(grids.images)), (VIDEO, slice(grids.images, None))):
        run = (kind_R == kind).nonzero()[0]
        need = need_G[part]
        last = length_R[run].cumsum()
        end = need.cumsum()
        if need.sum() != length_R[run].sum():
            return None
        begin = end - need
        inside = last.searchsorted(begin, side="right")
        if (end > last[inside]).any():
            return None
        starts.append(start_R[run][inside] + begin - (last - length_R[run])[inside])
        columns.append(np.arange(len(need_G))[part])
    start = np.concatenate(starts)
    order = start.argsort()
    column_R = np.concatenate(columns)[order]
    vision_V = (column_R >= 0).nonzero()[0]
    return start[order], vision_V, column_R[vision_V]


def _require_starts(
    spec: MRopeSpec, stream: Stream, start_V: IntArray, kind_V: IntArray
) -> None:
    """Refuse a run without the vision start marker in front: the reference takes it for text."""
    document_V = stream.start_D.searchsorted(start_V, side="right") - 1
    marked_V = stream.tokens_T[start_V - 1] == spec.vision_start_token_id
    marked_V &= start_V > stream.start_D[document_V]
    if not marked_V.all():
        raise missing_start(spec, stream, start_V, kind_V, int(marked_V.argmin()))


def _rows_agree(stream: Stream, runs: Runs, row_G: IntArray) -> bool:
    start_V = runs.start_R[runs.vision_V]
    document_V = stream.start_D.searchsorted(start_V, side="right") - 1
    row_V = row_G[runs.grid_V]
    return bool(((stream.row_D[document_V] == row_V) | (row_V < 0)).all())
