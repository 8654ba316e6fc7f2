"""Find where each image, clip or frame sits. Every malformed sample is caught here.

Only the fast way is here: one comparison says whether all runs fit their grids. Where they do not,
`mrope.positions.diagnose` finds out which row and span to name.

Shape suffixes: T tokens of the stream, D documents, D1 their borders (D + 1), R runs (text runs and
vision spans), R1 their borders, V runs of placeholders in the order of tokens, G the grids of
`mrope.positions.grids`.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mrope.arrays import BoolArray, IntArray, run_borders
from mrope.positions.diagnose import mismatch, missing_start, stray_video, torn_clip, wrong_gap
from mrope.positions.grids import Grids
from mrope.positions.located import Runs
from mrope.positions.stream import IMAGE, TEXT, VIDEO, Stream, count_up, documents_of, to_stream
from mrope.spec.families import NO_TOKEN
from mrope.spec.spec import MRopeSpec


def find_runs(spec: MRopeSpec, stream: Stream, grids: Grids, kind_T: npt.NDArray[np.uint8]) -> Runs:
    """Cut a stream into text runs and vision spans, and give every span its grid.

    A run is a longest stretch of tokens of one kind within a document. As a rule it is one span;
    where images stand side by side, their tokens are one run and the grids say where to cut it.

    Args:
        kind_T: what `token_kinds` returns.

    Raises:
        SpanMismatchError: tokens and grids do not fit together.
    """
    start_D = stream.border_D1[:-1]
    border_R1 = run_borders(kind_T, start_D)
    whole = _Cut(border_R1, border_R1[1:] - border_R1[:-1])
    kind_R = kind_T[border_R1[:-1]]
    vision_V: IntArray = kind_R.nonzero()[0]
    # A family without such a marker finds its spans by placeholders under every reference.
    if spec.conventions.start_required and spec.vision_start_token_id != NO_TOKEN:
        _require_starts(spec, stream, whole.start_R[vision_V], kind_R[vision_V])
    cut, vision_G = whole, _match_one_to_one(vision_V, whole.length_R, kind_R, grids)
    if vision_G is None:
        by_grids = _cut_by_grids(whole, kind_R, grids, len(kind_T))
        if by_grids is None:
            raise mismatch(stream, whole.start_R, whole.length_R, kind_R, grids)
        cut, vision_G = by_grids
    rows_known = grids.spans_B != (None, None)
    if rows_known and not _in_their_rows(stream, cut.border_R1[vision_G], grids):
        raise mismatch(stream, whole.start_R, whole.length_R, kind_R, grids)
    several = len(start_D) > 1 or spec.family_row.frame_gap is not None
    if several and grids.images + len(grids.frames_N) < grids.size_3G.shape[1]:
        _require_whole_clips(spec, stream, cut, vision_G, grids)
    if spec.family_row.frames_as_images and spec.video_token_id in stream.tokens_T:
        raise stray_video(spec, stream)
    first_D1 = cut.border_R1.searchsorted(stream.border_D1)
    return Runs(cut.border_R1, cut.length_R, first_D1, vision_G, np.logical_not(kind_T))


def token_kinds(spec: MRopeSpec, stream: Stream) -> npt.NDArray[np.uint8]:
    """Return TEXT, IMAGE or VIDEO for each token of a stream, uint8 (T,)."""
    placeholders = _column(spec.video_token_id, spec.image_token_id)
    is_2T = (stream.tokens_T == placeholders).view(np.uint8)
    kind_T: npt.NDArray[np.uint8] = is_2T[0]
    # Video twice, since VIDEO is 2: an addition with a mask (`where=`) takes ten times as long.
    kind_T += kind_T
    kind_T += is_2T[1]
    if spec.family_row.frames_as_images:
        kind_T[(kind_T == IMAGE) & _inside_videos(spec, stream)] = VIDEO
    return kind_T


@lru_cache(maxsize=64)
def _column(*token_ids: int) -> npt.NDArray[np.int64]:
    """Return token ids as (n, 1), to be compared with a whole stream in one call.

    A placeholder that the family does not have is `NO_TOKEN`, -1, which rows may hold as text.
    """
    ids = np.array(token_ids, np.int64)[:, None]
    ids[ids == NO_TOKEN] = np.iinfo(np.int64).min
    return ids


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
    """Where the runs of a stream start, T behind them, and their tokens."""

    border_R1: IntArray
    length_R: IntArray

    @property
    def start_R(self) -> IntArray:
        """Where each run starts in the stream."""
        return self.border_R1[:-1]


def _match_one_to_one(
    vision_V: IntArray, length_R: IntArray, kind_R: npt.NDArray[np.uint8], grids: Grids
) -> IntArray | None:
    """Return the run of each grid if every placeholder run is exactly one span, else None."""
    if len(vision_V) != grids.size_3G.shape[1]:
        return None
    # Grids stand images first, and the k-th image run has the k-th image grid: a stable sort by
    # kind brings runs into the order of grids. Runs of kinds [1, 2, 1] are sorted to 0, 2, 1.
    vision_G = vision_V[kind_R[vision_V].argsort(kind="stable")]
    kind_G, images = kind_R[vision_G], grids.images
    # Sorted kinds are IMAGE for the first `images` and VIDEO behind: two look-ups tell.
    if images and kind_G[images - 1] != IMAGE:
        return None
    if images < len(kind_G) and kind_G[images] != VIDEO:
        return None
    misfits = np.count_nonzero(length_R[vision_G] != grids.need_G)
    return None if misfits else vision_G


def _cut_by_grids(
    whole: _Cut, kind_R: npt.NDArray[np.uint8], grids: Grids, tokens: int
) -> tuple[_Cut, IntArray] | None:
    """Cut runs of adjacent images or frames by their grids; None where that does not come out.

    A run of 6 tokens and grids of 2 and 4 tokens: the grids start at placeholders 0 and 2, both lie
    within the run, and all 6 tokens are used; the spans start at the run's start and 2 tokens on.
    """
    start_R, length_R = whole.start_R, whole.length_R
    need_G = grids.need_G
    starts = []
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
    start_G = np.concatenate(starts)
    border_R1 = np.sort(np.concatenate((start_R[kind_R == TEXT], start_G, [tokens])))
    return _Cut(border_R1, border_R1[1:] - border_R1[:-1]), border_R1.searchsorted(start_G)


def _in_their_rows(stream: Stream, start_G: IntArray, grids: Grids) -> bool:
    """Whether as many spans stand before each row as have grids of the rows before it."""
    for start_V, spans_B in zip(
        (start_G[: grids.images], start_G[grids.images :]), grids.spans_B, strict=True
    ):
        if spans_B is not None:
            # Where the first document of each row, or of a later one, begins.
            first_B1 = stream.row_D.searchsorted(count_up(len(spans_B) + 1))
            before_B1 = start_V.searchsorted(stream.border_D1[first_B1])
            if before_B1.tolist() != [*accumulate(spans_B, initial=0)]:
                return False
    return True


def _require_starts(spec: MRopeSpec, stream: Stream, start_V: IntArray, kind_V: IntArray) -> None:
    """Refuse a run without the vision start marker in front: the reference takes it for text."""
    document_V = documents_of(stream, start_V)
    marked_V = stream.tokens_T[start_V - 1] == spec.vision_start_token_id
    marked_V &= start_V > stream.start_D[document_V]
    if not marked_V.all():
        raise missing_start(spec, stream, start_V, kind_V, int(marked_V.argmin()))


def _require_whole_clips(
    spec: MRopeSpec, stream: Stream, cut: _Cut, vision_G: IntArray, grids: Grids
) -> None:
    """Refuse a clip whose frames, each a span, stand in several rows or examples.

    Without counts for each row, frames are matched over the whole batch, and a row can use up
    frames of its neighbour's clip. The reference takes that.
    """
    start_V = cut.start_R[vision_G[grids.images :]]
    # As few calls as can be: this is on the way of every batch with a clip.
    first_of_document = start_V.searchsorted(stream.start_D).tolist()
    first_of_clip = {0, *accumulate(grids.frames_N)}
    if not first_of_clip.issuperset(first_of_document):
        raise torn_clip(stream, start_V, grids)
    gap = spec.family_row.frame_gap
    if gap is not None:
        between_V = start_V[1:] - (start_V + cut.length_R[vision_G[grids.images :]])[:-1]
        clip_V = np.arange(len(grids.frames_N)).repeat(grids.frames_N)
        wrong_V: BoolArray = (clip_V[1:] == clip_V[:-1]) & (between_V != gap)
        if wrong_V.any():
            frame = int(wrong_V.argmax())
            raise wrong_gap(spec, stream, start_V, grids, frame, int(between_V[frame]))
