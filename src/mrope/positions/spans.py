"""Step 4 of the way: where each image, clip or frame sits. Every malformed sample is caught here.

Shape suffixes: T tokens of the stream, D documents, R runs (text runs and vision spans), V vision
spans, G the grids of `mrope.positions.grids`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mrope.arrays import BoolArray, IntArray
from mrope.positions.diagnose import mismatch, missing_start, stray_video, type_mismatch
from mrope.positions.grids import Grids
from mrope.positions.stream import IMAGE, TEXT, VIDEO, Stream, to_stream
from mrope.spec.spec import MRopeSpec


class Runs(NamedTuple):
    """A stream cut into runs, each either text or one vision span; they cover every token.

    Attributes:
        start_R, length_R: where a run starts in the stream, and its tokens.
        first_D, runs_D: the first run of each document, and how many it has.
        vision_V: which of the runs are vision spans, ascending.
        grid_V: for each span its column of `Grids.size_3G`.
        text_T: True where a token is text.
    """

    start_R: IntArray
    length_R: IntArray
    first_D: IntArray
    runs_D: IntArray
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
    kind_T = token_kinds(spec, stream)
    if types_T is not None and not np.array_equal(kind_T, types_T):
        raise type_mismatch(stream, kind_T, types_T)
    whole = _runs_of_one_kind(kind_T, stream.start_D)
    kind_R = kind_T[whole.start_R]
    vision_V: IntArray = kind_R.nonzero()[0]
    if spec.conventions.start_required:
        _require_starts(spec, stream, whole.start_R[vision_V], kind_R[vision_V])
    grid_V = _match_one_to_one(whole.length_R[vision_V], kind_R[vision_V], grids)
    cut = whole
    if grid_V is None:
        by_grids = _cut_by_grids(whole, kind_R, grids, len(kind_T))
        if by_grids is None:
            raise mismatch(stream, *whole, kind_R, grids)
        cut, vision_V, grid_V = by_grids
    if grids.row_G is not None:
        document_V = stream.start_D.searchsorted(cut.start_R[vision_V], side="right") - 1
        if _crosses_rows(stream.row_D[document_V], grids.row_G[grid_V]):
            raise mismatch(stream, *whole, kind_R, grids)
    if spec.family_row.frames_as_images and spec.video_token_id in stream.tokens_T:
        raise stray_video(spec, stream)
    first_D = cut.start_R.searchsorted(stream.start_D)
    runs_D = cut.start_R.searchsorted(stream.start_D + stream.length_D) - first_D
    return Runs(*cut, first_D, runs_D, vision_V, grid_V, kind_T == TEXT)


def token_kinds(spec: MRopeSpec, stream: Stream) -> npt.NDArray[np.uint8]:
    """Return TEXT, IMAGE or VIDEO for each token."""
    tokens_T = stream.tokens_T
    kind_T: npt.NDArray[np.uint8] = (tokens_T == spec.video_token_id).view(np.uint8)
    np.add(kind_T, kind_T, out=kind_T)
    image_T: npt.NDArray[np.uint8] = (tokens_T == spec.image_token_id).view(np.uint8)
    np.bitwise_or(kind_T, image_T, out=kind_T)
    if spec.family_row.frames_as_images:
        np.add(kind_T, image_T & _inside_videos(spec, stream), out=kind_T)
    return kind_T


def token_types(spec: MRopeSpec, input_ids: IntArray) -> npt.NDArray[np.int64]:
    """Return `mm_token_type_ids` of (S,) or (B, S) ids: 1 at images, 2 at videos, else 0."""
    kind_T = token_kinds(spec, to_stream(np.atleast_2d(input_ids), None))
    return kind_T.astype(np.int64).reshape(input_ids.shape)


def _inside_videos(spec: MRopeSpec, stream: Stream) -> BoolArray:
    """Return which tokens have more video starts than video ends up to them in their document.

    That is how transformers' GLM-4V processor tells frames from images (5.23).
    start 9, end 8, tokens 7 9 1 1 8 1: depth 0 1 1 1 0 0, and so the first two 1 are frames.
    """
    start, end = spec.extra["video_start_token_id"], spec.extra["video_end_token_id"]
    change_T = (stream.tokens_T == start).astype(np.int64) - (stream.tokens_T == end)
    depth_T = change_T.cumsum()
    before_D = depth_T[stream.start_D] - change_T[stream.start_D]
    inside_T: BoolArray = depth_T > before_D.repeat(stream.length_D)
    return inside_T


class _Cut(NamedTuple):
    """Where the runs of a stream start, and their tokens."""

    start_R: IntArray
    length_R: IntArray


def _runs_of_one_kind(kind_T: npt.NDArray[np.uint8], start_D: IntArray) -> _Cut:
    """Cut where the kind changes or a document begins.

    kinds 0 0 1 1 | 1 0 with documents at 0 and 4 give bounds 0 2 4 5 6: runs of 2 2 1 1.
    """
    tokens = len(kind_T)
    bound = np.empty(tokens + 1, np.bool_)
    np.not_equal(kind_T[1:], kind_T[:-1], out=bound[1:tokens])
    bound[start_D] = True
    bound[tokens] = True
    bounds = bound.nonzero()[0]
    return _Cut(bounds[:-1], bounds[1:] - bounds[:-1])


def _match_one_to_one(length_V: IntArray, kind_V: IntArray, grids: Grids) -> IntArray | None:
    """Return each run's grid where every run is exactly one span, the usual case, else None."""
    if len(kind_V) != grids.size_3G.shape[1]:
        return None
    if np.count_nonzero(kind_V == IMAGE) != grids.images:
        return None
    # Grids stand images first: the k-th image run takes column k, the k-th video run images + k.
    # kinds [1, 2, 1] sort to runs [0, 2, 1]; so run 0 has column 0, run 2 column 1, run 1 column 2.
    grid_V = np.empty(len(kind_V), np.int64)
    grid_V[kind_V.argsort(kind="stable")] = np.arange(len(kind_V))
    misfits = np.count_nonzero(length_V != _needed_tokens(grids)[grid_V])
    return None if misfits else grid_V


def _needed_tokens(grids: Grids) -> IntArray:
    frames_G, height_G, width_G = grids.size_3G
    need_G: IntArray = frames_G * height_G * width_G
    return need_G


def _cut_by_grids(
    whole: _Cut, kind_R: npt.NDArray[np.uint8], grids: Grids, tokens: int
) -> tuple[_Cut, IntArray, IntArray] | None:
    """Cut runs of adjacent images or frames by their grids; None where that does not come out.

    A run of 6 tokens and grids of 2 and 4 tokens: the grids start at placeholders 0 and 2, both lie
    within the run, and all 6 tokens are used; the spans start at the run's start and 2 tokens on.
    """
    start_R, length_R = whole
    need_G = _needed_tokens(grids)
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
    start = start[order]
    return _Cut(start, np.diff(start, append=tokens)), vision_V, column_R[vision_V]


def _require_starts(spec: MRopeSpec, stream: Stream, start_V: IntArray, kind_V: IntArray) -> None:
    """Refuse a run without the vision start marker in front: the reference takes it for text."""
    document_V = stream.start_D.searchsorted(start_V, side="right") - 1
    marked_V = stream.tokens_T[start_V - 1] == spec.vision_start_token_id
    marked_V &= start_V > stream.start_D[document_V]
    if not marked_V.all():
        raise missing_start(spec, stream, start_V, kind_V, int(marked_V.argmin()))


def _crosses_rows(row_V: IntArray, grid_row_V: IntArray) -> bool:
    """Whether a span of one row has a grid of another; grid rows of -1 are unknown."""
    return bool(((row_V != grid_row_V) & (grid_row_V >= 0)).any())
