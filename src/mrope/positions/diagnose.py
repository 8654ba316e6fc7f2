"""What to say when tokens and grids do not fit: which row, which span, both counts, and why.

Plain loops: this code runs once, on the way to an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mrope.arrays import IntArray
from mrope.errors import SpanMismatchError
from mrope.positions.grids import Grids
from mrope.positions.stream import IMAGE, TEXT, VIDEO, Stream, documents_of
from mrope.spec.spec import MRopeSpec

_NAMES = {TEXT: "text", IMAGE: "image", VIDEO: "video"}

_CUT_RIGHT = "the row ends inside it: truncated at max_length after the processor ran"
_CUT_LEFT = "the row starts inside it: truncated on the left"
_NO_TOKENS = "its tokens were truncated away and its grid was kept, or the grid is another sample's"
_NO_GRID = (
    "a placeholder token that was typed or sampled as text, or a grid that was lost on the way"
)
_UNMERGED = "placeholders were not merged: one token per patch instead of one per merged patch"
_INVERTED = (
    "the mask is inverted: it must be 1 at tokens and 0 at padding, and with the opposite values "
    "tokens and grids fit"
)
_OTHER = "a grid of another sample or processor, or the spec of another model family"


class _Run(NamedTuple):
    """One run of placeholders: where it stands, its kind, its tokens, the borders it touches."""

    row: int
    kind: int
    tokens: int
    at_start: bool
    at_end: bool


def mismatch(
    stream: Stream, start_R: IntArray, length_R: IntArray, kind_R: IntArray, grids: Grids
) -> SpanMismatchError:
    """Return the error for the first span, in token order, that does not fit its grid."""
    walk = _Walk(grids, rows=stream.row_D.tolist())
    for run in _placeholder_runs(stream, start_R, length_R, kind_R):
        error = walk.left_over(before=run.row) or walk.take(run)
        if error is not None:
            return error
    error = walk.left_over()
    assert error is not None  # the caller saw a mismatch
    return error


class _Walk:
    """Deals out the grids of a batch, or of each row where the batch says how many it has."""

    def __init__(self, grids: Grids, rows: list[int]) -> None:
        self.grids = grids
        self.rows = rows
        self.ordinals: Counter[tuple[int, int]] = Counter()
        # Columns that are left, last first, for each row and kind; row -1: of the whole batch.
        self.queues: dict[tuple[int, int], list[int]] = {}
        self.kinds_by_row: set[int] = set()
        row_G = grids.row_G
        for column in reversed(range(grids.size_3G.shape[1])):
            kind = IMAGE if column < grids.images else VIDEO
            row = int(row_G[column]) if row_G is not None else -1
            self.queues.setdefault((row, kind), []).append(column)
            if row >= 0:
                self.kinds_by_row.add(kind)

    def take(self, run: _Run) -> SpanMismatchError | None:
        """Use up the grids of one run; several stand side by side if their tokens add up to it."""
        queue = self.queues.get((run.row if run.kind in self.kinds_by_row else -1, run.kind), [])
        rest, taken = run.tokens, 0
        while rest and taken < len(queue) and self._needed(queue[-1 - taken]) <= rest:
            rest -= self._needed(queue[-1 - taken])
            taken += 1
        if rest and queue and run.tokens == self._needed(queue[-1]) * self.grids.merge**2:
            return self._error(run, found=run.tokens, column=queue[-1])
        self.ordinals[run.row, run.kind] += taken
        del queue[len(queue) - taken :]
        return self._error(run, found=rest, column=queue[-1] if queue else None) if rest else None

    def _needed(self, column: int | None) -> int:
        return 0 if column is None else int(self.grids.size_3G[:, column].prod())

    def left_over(self, before: int | None = None) -> SpanMismatchError | None:
        """Return the error for the first grid that no token asked for, or None.

        Args:
            before: only look at grids that are known to be of rows before this one.
        """
        left = [
            key
            for key, queue in sorted(self.queues.items())
            if queue and (before is None or 0 <= key[0] < before)
        ]
        if not left:
            return None
        row, kind = left[0]
        queue = self.queues[row, kind]
        known: int | None = row
        if kind not in self.kinds_by_row:
            known = self.rows[0] if len(self.rows) == 1 else None
        column = queue[-1]
        ordinal = self.ordinals[known, kind] if known is not None else None
        needed = self._needed(column)
        counts = [self.ordinals[row, kind] for row in self.rows]
        where = (
            f"row {known}, {_NAMES[kind]} {ordinal}"
            if known is not None
            else f"{_NAMES[kind]} grid {column - (kind == VIDEO) * self.grids.images} of the "
            f"batch, row unknown (rows {self.rows} have tokens for {counts} {_NAMES[kind]}s; "
            f"give {_NAMES[kind]}s_per_sample to check each row on its own)"
        )
        return _span_error(where, known, ordinal, kind, 0, needed, self._size(column), _NO_TOKENS)

    def _error(self, run: _Run, found: int, column: int | None) -> SpanMismatchError:
        ordinal = self.ordinals[run.row, run.kind]
        needed = self._needed(column)
        cause = self._cause(run, found, column, needed)
        if run.kind not in self.kinds_by_row and len(self.rows) > 1:
            cause += (
                "; grids were matched over the whole batch, so a row before may have lost one: "
                f"give {_NAMES[run.kind]}s_per_sample to check each row on its own"
            )
        where = f"row {run.row}, {_NAMES[run.kind]} {ordinal}"
        if found != run.tokens:
            where += f" (in a run of {run.tokens} adjacent {_NAMES[run.kind]} tokens)"
        return _span_error(
            where, run.row, ordinal, run.kind, found, needed, self._size(column), cause
        )

    def _cause(self, run: _Run, found: int, column: int | None, needed: int) -> str:
        if column is None:
            return _NO_GRID
        if found == needed * self.grids.merge**2:
            return _UNMERGED
        if run.at_end:
            return _CUT_RIGHT
        return _CUT_LEFT if run.at_start else _OTHER

    def _size(self, column: int | None) -> str:
        if column is None:
            return "has no grid"
        frames, height, width = self.grids.size_3G[:, column].tolist()
        merge = self.grids.merge
        over_time = self.grids.frame_merge if column >= self.grids.images else 1
        patches = [frames * over_time, height * merge, (width - self.grids.newlines) * merge]
        merged = f"{merge}" if over_time == 1 else f"{over_time} x {merge} x {merge}"
        merged += " with a newline token for each line" if self.grids.newlines else ""
        return f"its grid {patches}, merged by {merged}, needs {frames * height * width}"


def _placeholder_runs(
    stream: Stream, start_R: IntArray, length_R: IntArray, kind_R: IntArray
) -> Iterator[_Run]:
    document_R = documents_of(stream, start_R)
    for start, length, kind, document in zip(
        start_R.tolist(), length_R.tolist(), kind_R.tolist(), document_R.tolist(), strict=True
    ):
        first = int(stream.start_D[document])
        last = first + int(stream.length_D[document])
        if kind != TEXT:
            yield _Run(
                int(stream.row_D[document]), kind, length, start == first, start + length == last
            )


def _span_error(
    where: str,
    row: int | None,
    span: int | None,
    kind: int,
    found: int,
    needed: int,
    size: str,
    cause: str,
) -> SpanMismatchError:
    return SpanMismatchError(
        f"{where}: found {found} placeholder token{'' if found == 1 else 's'}, but {size}. "
        f"Likely cause: {cause}.",
        row=row,
        span=span,
        modality=_NAMES[kind],
        found=found,
        needed=needed,
        cause=cause,
    )


def torn_clip(stream: Stream, start_V: IntArray, grids: Grids) -> SpanMismatchError:
    """Return the error for the first clip whose frames stand in several rows or examples.

    Args:
        start_V: where each frame starts in the stream, in the order of the grids.
    """
    clip_V, document_V = _frames(stream, start_V, grids)
    torn_V = (clip_V[1:] == clip_V[:-1]) & (document_V[1:] != document_V[:-1])
    clip, document = (int(one_V[torn_V.argmax()]) for one_V in (clip_V, document_V))
    inside = int(np.count_nonzero((clip_V == clip) & (document_V == document)))
    frames = int(grids.frames_N[clip])
    column = grids.images + int((clip_V < clip).sum())
    tokens = int(grids.size_3G[:, column].prod())
    row, ordinal = int(stream.row_D[document]), _ordinal(clip_V, document_V, clip, document)
    return _span_error(
        f"row {row}, video {ordinal}",
        row,
        ordinal,
        VIDEO,
        inside * tokens,
        frames * tokens,
        f"its grid has {frames} frames of {tokens} tokens, and needs {frames * tokens}",
        "a grid of another sample; grids were matched over the whole batch: give "
        "videos_per_sample to check each row on its own",
    )


def wrong_gap(
    spec: MRopeSpec, stream: Stream, start_V: IntArray, grids: Grids, frame: int, found: int
) -> SpanMismatchError:
    """Return the error for a frame that does not stand where the family's rule counts on it.

    Args:
        start_V: where each frame starts in the stream, in the order of the grids.
        frame: the one in front of the gap.
        found: tokens between it and the next.
    """
    clip_V, document_V = _frames(stream, start_V, grids)
    clip, document = int(clip_V[frame]), int(document_V[frame])
    number = frame - int((clip_V < clip).sum())
    row, ordinal = int(stream.row_D[document]), _ordinal(clip_V, document_V, clip, document)
    gap, family = spec.family_row.frame_gap, spec.family
    cause = "tokens were added, lost or repeated inside the clip, or another processor's layout"
    return SpanMismatchError(
        f"row {row}, video {ordinal}: {found} tokens stand between frames {number} and "
        f"{number + 1}, but {family} has {gap} there, an end and a start marker. Likely cause: "
        f"{cause}.",
        row=row,
        span=ordinal,
        modality="video",
        found=found,
        needed=gap,
        cause=cause,
    )


def _frames(stream: Stream, start_V: IntArray, grids: Grids) -> tuple[IntArray, IntArray]:
    """Return the clip and the document of each frame."""
    clip_V = np.arange(len(grids.frames_N)).repeat(grids.frames_N)
    return clip_V, documents_of(stream, start_V)


def _ordinal(clip_V: IntArray, document_V: IntArray, clip: int, document: int) -> int:
    """Return which clip of its document this is."""
    return len({*clip_V[(document_V == document) & (clip_V < clip)].tolist()})


def inverted_mask(
    error: SpanMismatchError, stream: Stream, kind_T: npt.NDArray[np.uint8]
) -> SpanMismatchError:
    """Return an error with an inverted attention mask as its cause.

    Args:
        error: of the batch as it was given; it may name a row of padding.
        stream, kind_T: of the batch with the opposite mask, in which tokens and grids fit.
    """
    vision_V = kind_T.nonzero()[0]
    if not vision_V.size:  # audio alone
        return error
    row_V = stream.row_D[documents_of(stream, vision_V)]
    row, modality = int(row_V[0]), _NAMES[int(kind_T[vision_V[0]])]
    needed = int(np.count_nonzero(row_V == row))
    return SpanMismatchError(
        f"row {row}: attention_mask is 0 at all {needed} placeholder tokens. Likely cause: "
        f"{_INVERTED}.",
        row=row,
        modality=modality,
        found=0,
        needed=needed,
        cause=_INVERTED,
    )


def missing_start(
    spec: MRopeSpec, stream: Stream, start_V: IntArray, kind_V: IntArray, span: int
) -> SpanMismatchError:
    """Return the error for a span without the marker that the reference finds spans by."""
    document_V = documents_of(stream, start_V)
    row = int(stream.row_D[document_V[span]])
    kind = int(kind_V[span])
    before = (document_V[:span] == document_V[span]) & (kind_V[:span] == kind)
    ordinal = int(np.count_nonzero(before))
    cause = f"a stray placeholder in text, or a reference that does not fit: {spec.reference}"
    return SpanMismatchError(
        f"row {row}, {_NAMES[kind]} {ordinal}: no vision start token "
        f"{spec.vision_start_token_id} stands before its placeholder tokens, without which "
        f"{spec.reference} numbers them as text. Likely cause: {cause}.",
        row=row,
        span=ordinal,
        modality=_NAMES[kind],
        cause=cause,
    )


def type_mismatch(
    stream: Stream, kind_T: npt.NDArray[np.uint8], types_T: IntArray
) -> SpanMismatchError:
    """Return the error for the first token whose type and id disagree."""
    token = int((kind_T != types_T).argmax())
    row, where = _place(stream, token)
    kind, given = int(kind_T[token]), int(types_T[token])
    cause = "a placeholder token that was typed or sampled as text, or types of another batch"
    return SpanMismatchError(
        f"{where}: mm_token_type_ids says {given} "
        f"({_NAMES.get(given, 'unknown to this family')}), but token id "
        f"{int(stream.tokens_T[token])} is {_NAMES[kind]}. Likely cause: {cause}.",
        row=row,
        modality=_NAMES.get(given),
        cause=cause,
    )


def stray_video(spec: MRopeSpec, stream: Stream) -> SpanMismatchError:
    """Return the error for a placeholder of videos where frames have those of images."""
    token = int((stream.tokens_T == spec.video_token_id).argmax())
    row, where = _place(stream, token)
    return SpanMismatchError(
        f"{where}: video placeholder {spec.video_token_id}, but in {spec.family} frames stand as "
        f"image placeholders {spec.image_token_id}. Likely cause: {_NO_GRID}.",
        row=row,
        modality="video",
        cause=_NO_GRID,
    )


def _place(stream: Stream, token: int) -> tuple[int, str]:
    """Return the row of a token of the stream, and how errors name its place there."""
    document = int(documents_of(stream, np.array([token]))[0])
    row = int(stream.row_D[document])
    return row, f"row {row}, valid token {token - int(stream.start_D[document])}"
