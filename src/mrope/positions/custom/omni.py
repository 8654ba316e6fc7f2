"""Qwen2.5-Omni and Qwen3-Omni thinkers: images, videos, audio, and audio in videos.

Spans stand between markers, and each begins after the largest position so far, time included. So a
span's place depends on all spans before it, and in Qwen3-Omni it is a float32 that every step
rounds: spans are gone through one by one, in the reference's order of additions. Within a span
there is no loop over tokens; the two streams of a video with audio are merged by one sort.

Source: `get_rope_index` of `qwen2_5_omni` and `qwen3_omni_moe`, transformers 5.23.

Shape suffixes: n tokens of a row without padding, K tokens of a span's block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mrope.arrays import IntArray
from mrope.errors import MRopeError, SpanMismatchError
from mrope.positions.custom.omni_media import MediaCursor, read_counts, read_media
from mrope.positions.inputs import BatchInputs
from mrope.positions.located import Located
from mrope.spec.spec import MRopeSpec

Array = npt.NDArray[Any]

# Far beyond any clip, and within what float32 counts without gaps.
_MAX_TIME = 2**23

_AUDIO, _AUDIO_START = "audio_token_id", "audio_start_token_id"
_ONE = np.float32(1)
_CUT = "the row ends inside it: truncated at max_length after the processor ran"
_STRAY = "a placeholder token that was typed or sampled as text, or a lost marker"
_OTHER = "sizes of another sample or processor, or the spec of another model family"


@dataclass(frozen=True)
class Thinker:
    """What the two thinkers do differently.

    Attributes:
        dtype: of positions and deltas.
        shared_markers: the two markers at either end of a video with audio share a position.
    """

    dtype: type
    shared_markers: bool


def number_omni_2_5(spec: MRopeSpec, located: Located) -> tuple[Array, Array]:
    """Number the tokens of a Qwen2.5-Omni batch: positions (3, T) and ends (D,), both int64.

    See `number_omni_3` for arguments and errors. Time is truncated to integers. A video with audio
    is cut into chunks of `position_id_per_seconds * seconds_per_chunk` positions, in which video
    and audio alternate.
    """
    return _compute(_OMNI_2_5, spec, located)


def number_omni_3(spec: MRopeSpec, located: Located) -> tuple[Array, Array]:
    """Number the tokens of a Qwen3-Omni batch: positions (3, T) and ends (D,), both float32.

    Time is not truncated, so that position ids may be fractions. In a video with audio, tokens are
    merged by time.

    Args:
        spec: with `extra` audio_token_id, audio_start_token_id, position_id_per_seconds, and
            n_window (Qwen3) or seconds_per_chunk (Qwen2.5).
        located: the batch, with `second_per_grid_ts` (videos,) in seconds; `audio_seqlens`
            (audios,), mel frames of each audio, those in videos among them; `use_audio_in_video`,
            whether videos have their audio inside: a bool, or one for each, (videos,).

    Raises:
        SpanMismatchError: placeholders do not fit grids or audio lengths, or lack their markers.
        MRopeError: an argument of a wrong shape, dtype or value.
    """
    return _compute(_OMNI_3, spec, located)


def number_omni_3_talker(spec: MRopeSpec, located: Located) -> tuple[Array, Array]:
    """Number the thinker's tokens for Qwen3-Omni's talker: as `number_omni_3`.

    Without images, clips and audio its model takes the running sum of the mask, as integers.
    """
    stream = located.stream
    if not is_silent(spec, located.inputs):
        return number_omni_3(spec, located)
    own_T = np.arange(len(stream.tokens_T)) - stream.start_D.repeat(stream.length_D)
    return own_T[None].repeat(3, axis=0), stream.length_D


def is_silent(spec: MRopeSpec, inputs: BatchInputs) -> bool:
    """Whether the talker's model leaves a batch, without any media, to the sum of its mask."""
    media = any(len(inputs.media[modality].size_N3) for modality in ("image", "video"))
    return spec.conventions.talker_sums_mask and not media and not inputs.media["audio"].name


_OMNI_2_5 = Thinker(dtype=np.int64, shared_markers=True)
_OMNI_3 = Thinker(dtype=np.float32, shared_markers=False)


class _Span(NamedTuple):
    """What begins at a marker.

    Attributes:
        name: image, video or audio.
        markers: in front of it, and as many behind.
        size: frames, merged height and merged width of the image or video; None for audio alone.
        seconds: between two frames.
        audio: tokens of its audio.
    """

    name: str
    markers: int
    size: tuple[int, int, int] | None
    seconds: np.float32
    audio: int

    @property
    def tokens(self) -> int:
        """Tokens between the markers."""
        frames, height, width = self.size or (0, 0, 0)
        return frames * height * width + self.audio


def _compute(thinker: Thinker, spec: MRopeSpec, located: Located) -> tuple[Array, Array]:
    inputs, stream = located.inputs, located.stream
    cursor = MediaCursor(read_media(spec, inputs), read_counts(inputs))
    together = _together(inputs, len(cursor.media.videos))
    positions_3T: Array = np.empty((3, len(stream.tokens_T)), thinker.dtype)
    end_D: Array = np.zeros(len(stream.row_D), thinker.dtype)
    rows = inputs.shape[0]
    first_B1 = stream.row_D.searchsorted(np.arange(rows + 1)).tolist()
    for row in range(rows):
        cursor.begin_row(row)
        # One document, unless the row holds several examples.
        for document in range(first_B1[row], first_B1[row + 1]):
            part = slice(*stream.border_D1[document : document + 2].tolist())
            walk = _Row(thinker, spec, cursor, together)
            positions_3T[:, part] = walk.number(stream.tokens_T[part])
            end_D[document] = positions_3T[:, part].max() + thinker.dtype(1)
        cursor.check_row()
    cursor.check_all_taken()
    return positions_3T, end_D


@dataclass
class _Row:
    """Numbers one row: a piece for each text and each span."""

    thinker: Thinker
    spec: MRopeSpec
    cursor: MediaCursor
    together: list[bool]

    @property
    def row(self) -> int:
        """Its number in the batch, for messages."""
        return self.cursor.row

    def number(self, tokens_n: IntArray) -> Array:
        """Return the positions (3, n) of a row's tokens."""
        one = self.thinker.dtype(1)
        base = self.thinker.dtype(0)
        cursor = 0
        pieces: list[Array] = []
        for start in self._starts(tokens_n):
            if start < cursor:
                continue  # the second marker of a video with audio
            span = self._span(tokens_n, start)
            # Before a block is made: of a size that does not fit, it might be a huge one.
            self._check_tokens(tokens_n, start, span)
            pieces.append(self._along(base, start - cursor))
            base += self.thinker.dtype(start - cursor)
            shared = span.markers == 2 and self.thinker.shared_markers
            pieces.append(self._markers(base, span.markers, shared))
            base += self.thinker.dtype(1 if shared else span.markers)
            block_3K, last = self._block(base, span)
            end = start + span.markers + span.tokens
            pieces.append(block_3K)
            base = last + one
            pieces.append(self._markers(base, span.markers, shared))
            base = pieces[-1].max() + one
            cursor = end + span.markers
        pieces.append(self._along(base, len(tokens_n) - cursor))
        numbered = np.concatenate(pieces, axis=1)
        self._refuse_strays(tokens_n, pieces)
        return numbered

    def _starts(self, tokens_n: IntArray) -> list[int]:
        marker_n = tokens_n == self.spec.vision_start_token_id
        marker_n |= tokens_n == self.spec.extra[_AUDIO_START]
        starts: list[int] = marker_n.nonzero()[0].tolist()
        return starts

    def _along(self, base: object, length: int) -> Array:
        """Return tokens that count up on all three axes."""
        count = np.arange(length).astype(self.thinker.dtype) + base
        return np.broadcast_to(count, (3, length))

    def _markers(self, base: object, count: int, shared: bool) -> Array:
        return np.full((3, count), base) if shared else self._along(base, count)

    def _span(self, tokens_n: IntArray, start: int) -> _Span:
        """Say what begins at a marker, and take what it needs."""
        spec, audio_start = self.spec, self.spec.extra[_AUDIO_START]
        behind = int(tokens_n[start + 1]) if start + 1 < len(tokens_n) else None
        if tokens_n[start] == audio_start:
            return _Span("audio", 1, None, _ONE, self._audio())
        if behind == spec.image_token_id:
            return _Span("image", 1, *self._size("image"), 0)
        together = self.together[min(self.cursor.number("video"), len(self.together) - 1)]
        if behind == spec.video_token_id and not together:
            return _Span("video", 1, *self._size("video"), 0)
        if behind == audio_start and together:
            return _Span("video", 2, *self._size("video"), self._audio())
        raise SpanMismatchError(
            f"row {self.row}, valid token {start}: behind the vision start token stands "
            f"{'nothing' if behind is None else f'token id {behind}'}, which begins no image or "
            f"video with use_audio_in_video={together}. Likely cause: {_STRAY}, or "
            "use_audio_in_video differs from what the processor was told.",
            row=self.row,
            cause=_STRAY,
        )

    def _size(self, kind: str) -> tuple[tuple[int, int, int], np.float32]:
        """Take the next image or video: frames, height and width, and the seconds of a frame."""
        media = self.cursor.media
        ordinal = self.cursor.take(kind)
        if ordinal is None:
            raise self._no_size(kind, "grid")
        frames, height, width = media.sizes(kind)[ordinal].tolist()
        return (frames, height, width), _ONE if kind == "image" else media.seconds[ordinal]

    def _frames(self, size: tuple[int, int, int], seconds: np.float32) -> Array:
        """Return the block (3, K) of an image or a video, from 0, times as the reference rounds."""
        frames, height, width = size
        rate = np.float32(self.spec.extra["position_id_per_seconds"])
        times = np.arange(frames).astype(np.float32) * seconds * rate
        block: Array = np.empty((3, frames, height, width), self.thinker.dtype)
        block[0] = times.astype(self.thinker.dtype)[:, None, None]
        block[1] = np.arange(height)[:, None]
        block[2] = np.arange(width)
        return block.reshape(3, -1)

    def _audio(self) -> int:
        """Return the tokens of the next audio."""
        ordinal = self.cursor.take("audio")
        if ordinal is None:
            raise self._no_size("audio", "length")
        return int(self.cursor.media.audios[ordinal])

    def _block(self, base: object, span: _Span) -> tuple[Array, Any]:
        """Return a span's positions (3, K), and the largest one of its last piece."""
        if span.size is None:
            block_3K = self._along(base, span.audio)
            return block_3K, block_3K[0, -1]
        video_3K = self._frames(span.size, span.seconds) + base
        if span.markers == 1:
            return video_3K, video_3K.max()
        audio_3K = self._along(base, span.audio)
        if self.thinker.shared_markers:
            chunk = int(
                self.spec.extra["position_id_per_seconds"] * self.spec.extra["seconds_per_chunk"]
            )
            keys = [_chunks(part[0] - base, chunk) for part in (video_3K, audio_3K)]
        else:
            keys = [video_3K[0], audio_3K[0]]
        key_K = np.concatenate(keys)
        of_audio_K = np.arange(len(key_K)) >= video_3K.shape[1]
        # Both streams are in order, and video stands first: a stable sort is the reference's merge.
        order_K = key_K.argsort(kind="stable")
        merged_3K = np.concatenate((video_3K, audio_3K), axis=1)[:, order_K]
        key_K, of_audio_K = key_K[order_K], of_audio_K[order_K]
        last_K = of_audio_K == of_audio_K[-1]
        if self.thinker.shared_markers:
            last_K &= key_K == key_K[-1]
        else:
            last_K[: np.flatnonzero(~last_K)[-1] + 1] = False
        return merged_3K, merged_3K[:, last_K].max()

    def _check_tokens(self, tokens_n: IntArray, start: int, span: _Span) -> None:
        """Compare the placeholders behind the markers with those that sizes ask for."""
        first, needed = start + span.markers, span.tokens
        wanted = {
            self.spec.image_token_id: needed if span.name == "image" else 0,
            self.spec.video_token_id: needed - span.audio if span.name == "video" else 0,
            int(self.spec.extra[_AUDIO]): span.audio,
        }
        inside_n = np.isin(tokens_n[first:], list(wanted))
        found = int(inside_n.argmin()) if not inside_n.all() else len(inside_n)
        body_n = tokens_n[first : first + needed]
        counts = {token: int(np.count_nonzero(body_n == token)) for token in wanted}
        behind_n = tokens_n[first + needed : first + needed + span.markers]
        # A start where the end should be is one more audio to the reference.
        started = self.spec.extra[_AUDIO_START] in behind_n
        closed = len(behind_n) == span.markers and not started
        if needed and found == needed and counts == wanted and closed:
            mixed = span.markers == 2 and body_n[0] != self.spec.video_token_id
            if not mixed:
                return
        ordinal = self.cursor.in_row(span.name) - 1
        cut = first + found >= len(tokens_n)
        cause = _CUT if cut else _OTHER if closed else _STRAY
        raise SpanMismatchError(
            f"row {self.row}, {span.name} {ordinal}: found {found} placeholder tokens behind its "
            f"start marker, and {'an' if closed else 'no'} end marker, but its sizes need {needed}"
            f"{f', {span.audio} of them audio' if span.markers == 2 else ''}. Likely cause: "
            f"{cause}.",
            row=self.row,
            span=ordinal,
            modality=span.name,
            found=found,
            needed=needed,
            cause=cause,
        )

    def _refuse_strays(self, tokens_n: IntArray, pieces: list[Array]) -> None:
        """Refuse placeholders outside of spans; pieces are text, markers, block, markers, text."""
        numbers = self.spec.extra
        placeholders = [
            self.spec.image_token_id,
            self.spec.video_token_id,
            int(numbers[_AUDIO]),
        ]
        outside_n = np.isin(tokens_n, placeholders)
        ends = np.cumsum([piece.shape[1] for piece in pieces])
        for start, end in zip(ends[1::4], ends[2::4], strict=True):
            outside_n[start:end] = False
        if outside_n.any():
            token = int(outside_n.argmax())
            raise SpanMismatchError(
                f"row {self.row}, valid token {token}: placeholder {int(tokens_n[token])} stands "
                f"in no span. Likely cause: {_STRAY}.",
                row=self.row,
                cause=_STRAY,
            )

    def _no_size(self, kind: str, what: str) -> SpanMismatchError:
        ordinal = self.cursor.in_row(kind) - 1
        return SpanMismatchError(
            f"row {self.row}, {kind} {ordinal}: its start marker has no {what} in the batch. "
            f"Likely cause: a {what} that was lost on the way, or {_STRAY}.",
            row=self.row,
            span=ordinal,
            modality=kind,
            cause=_STRAY,
        )


def _chunks(times_K: IntArray, chunk: int) -> IntArray:
    """Return the chunk that each token of one stream falls into.

    A new chunk begins where time reaches the next multiple of `chunk`, and a token begins one at
    most: after a gap the count lags behind, token by token. With windows w = time // chunk, which
    never fall, the count is k_i = min(k_(i-1) + 1, w_i), and so k_i - i a running minimum:

        w 0 0 3 3 3 3     w - i 0 -1 1 0 -1 -2     minimum 0 -1 -1 -1 -1 -2     k 0 0 1 2 3 3
    """
    place_K = np.arange(len(times_K))
    count_K: IntArray = np.minimum.accumulate(times_K // chunk - place_K) + place_K
    return count_K


def omni_tokens(spec: MRopeSpec, placeholders: int, audio: int, end_id: int) -> list[int]:
    """Return the tokens of a clip with audio inside, or of either alone.

    The rule reads only the first placeholder of such a clip, and orders the others by their times.

    Args:
        placeholders, audio: tokens of the frames and of the audio; 0: none.
        end_id: stands for the end markers, which positions treat as text.
    """
    start, sound = (int(spec.extra[name]) for name in (_AUDIO_START, _AUDIO))
    video = [spec.video_token_id] * placeholders
    if not audio:
        return [spec.vision_start_token_id, *video, end_id]
    tokens = [start, *video, *[sound] * audio, end_id]
    return [spec.vision_start_token_id, *tokens, end_id] if video else tokens


def _together(inputs: BatchInputs, clips: int) -> list[bool]:
    """Return for each clip whether it has its audio inside, and last for clips without a grid."""
    flags = inputs.flags.get("use_audio_in_video", np.zeros(1, np.bool_))
    if flags.shape != (clips,) and flags.any() != flags.all():
        raise MRopeError(
            f"use_audio_in_video must be one bool for the whole batch, or one for each of its "
            f"{clips} clips, not {flags.tolist()}"
        )
    each = flags.tolist() if flags.shape == (clips,) else [bool(flags.any())] * clips
    return [*each, bool(flags.any())]
