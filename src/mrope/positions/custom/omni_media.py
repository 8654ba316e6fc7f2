"""Images, videos and audios of an Omni batch: their sizes checked, and taken one after another.

Shape suffixes: N images, videos or audios of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mrope.arrays import IntArray, as_array, as_integers
from mrope.errors import MRopeError, SpanMismatchError
from mrope.positions.inputs import BatchInputs
from mrope.spec.spec import MRopeSpec
from mrope.towers import AudioSpec, audio_tokens

# Far beyond any clip, and within what float32 counts without gaps.
_MAX_TIME = 2**23
_KINDS = ("image", "video", "audio")
_CUT = "tokens were truncated away and sizes kept"


class Media(NamedTuple):
    """What the spans of a batch take, in the order of the batch.

    Attributes:
        images, videos: (N, 3) frames, merged height and merged width.
        seconds: (N,) between two frames of each video.
        audios: (N,) tokens of each audio.
    """

    images: IntArray
    videos: IntArray
    seconds: npt.NDArray[np.float32]
    audios: IntArray

    def sizes(self, kind: str) -> IntArray:
        """Return images, videos or audios."""
        sizes: IntArray = getattr(self, f"{kind}s")
        return sizes


class MediaCursor:
    """Takes the images, videos and audios of a batch in order, and counts those of each row.

    Args:
        media: those of the batch.
        per_row: how many of each kind every row has, by kind; None where the batch does not say.
    """

    def __init__(self, media: Media, per_row: Mapping[str, list[int] | None]) -> None:
        self.media = media
        self.row = 0
        self._per_row = per_row
        self._taken = dict.fromkeys(_KINDS, 0)
        self._before_row = dict(self._taken)

    def begin_row(self, row: int) -> None:
        """Count anew: what is taken from now on belongs to this row."""
        self.row = row
        self._before_row = dict(self._taken)

    def take(self, kind: str) -> int | None:
        """Return the number of the next of a kind; None where none is left."""
        ordinal = self._taken[kind]
        self._taken[kind] += 1
        return ordinal if ordinal < len(self.media.sizes(kind)) else None

    def in_row(self, kind: str) -> int:
        """Return how many of a kind were taken in this row."""
        return self._taken[kind] - self._before_row[kind]

    def check_row(self) -> None:
        """Raise SpanMismatchError if the row took another number than it carries."""
        for kind, counts in self._per_row.items():
            found = self.in_row(kind)
            if counts is not None and counts[self.row] != found:
                cause = f"{_CUT}, or sizes are another sample's"
                raise SpanMismatchError(
                    f"row {self.row}: tokens for {found} {kind}s, but the row carries "
                    f"{counts[self.row]}. Likely cause: {cause}.",
                    row=self.row,
                    modality=kind,
                    found=found,
                    needed=counts[self.row],
                    cause=cause,
                )

    def check_all_taken(self) -> None:
        """Raise SpanMismatchError if the batch has more than its tokens took."""
        for kind in _KINDS:
            there, taken = len(self.media.sizes(kind)), self._taken[kind]
            if taken < there:
                raise SpanMismatchError(
                    f"the batch has {there} {kind}s, but tokens for {taken}. Likely cause: {_CUT}.",
                    modality=kind,
                    found=taken,
                    needed=there,
                    cause=_CUT,
                )


def read_media(spec: MRopeSpec, inputs: BatchInputs) -> Media:
    """Check the sizes of a batch, and merge them.

    Raises:
        MRopeError: grids, seconds or audio lengths of a wrong shape, dtype or value.
    """
    images = _merged("image_grid_thw", inputs.image_grid_thw, spec.spatial_merge_size)
    videos = _merged("video_grid_thw", inputs.video_grid_thw, spec.spatial_merge_size)
    seconds = _seconds(spec, inputs, videos)
    media = Media(images, videos, seconds, _audio_lengths(spec, inputs))
    _refuse_huge(media, inputs.input_ids.size)
    return media


def read_counts(inputs: BatchInputs) -> dict[str, list[int] | None]:
    """Return how many images, videos and audios each row has, as far as the batch says."""
    return {
        kind: _as_counts(name, getattr(inputs, name), inputs.shape[0])
        for kind in _KINDS
        for name in (f"{kind}s_per_sample",)
    }


def _seconds(spec: MRopeSpec, inputs: BatchInputs, videos: IntArray) -> npt.NDArray[np.float32]:
    if inputs.second_per_grid_ts is None and len(videos):
        raise MRopeError("videos need second_per_grid_ts (video_second_per_grid), one for each")
    given: npt.ArrayLike = [] if inputs.second_per_grid_ts is None else inputs.second_per_grid_ts
    seconds = as_array("second_per_grid_ts", given, "seconds of each video")
    if seconds.shape != (len(videos),) or seconds.dtype.kind not in "iuf":
        raise MRopeError(
            f"second_per_grid_ts must be {len(videos)} numbers, one for each video, not "
            f"{seconds.dtype} {seconds.shape}"
        )
    if not (np.isfinite(seconds) & (seconds >= 0)).all():
        raise MRopeError(f"second_per_grid_ts must be finite and not negative: {seconds.tolist()}")
    rate = spec.extra["position_id_per_seconds"]
    long = seconds.astype(np.float64) * videos[:, 0] * rate >= _MAX_TIME
    if long.any():
        video = int(long.argmax())
        raise MRopeError(
            f"second_per_grid_ts[{video}] = {seconds[video]}: {videos[video, 0]} frames would end "
            f"at position {_MAX_TIME} or later, at {rate} a second"
        )
    return seconds.astype(np.float32)


def _audio_lengths(spec: MRopeSpec, inputs: BatchInputs) -> IntArray:
    """Return the tokens of each audio."""
    frames = as_integers(
        "audio_seqlens",
        [] if inputs.audio_seqlens is None else inputs.audio_seqlens,
        "mel frames of each audio",
    )
    if frames.ndim != 1:
        raise MRopeError(f"audio_seqlens must have shape (audios,), not {frames.shape}")
    tokens = _audio_tokens(spec, frames.astype(np.int64))
    if (frames < 1).any() or (tokens < 1).any():
        audio = int(((frames < 1) | (tokens < 1)).argmax())
        raise MRopeError(f"audio_seqlens[{audio}] = {frames[audio]}: too short for a token")
    return tokens


def _audio_tokens(spec: MRopeSpec, mel_frames_N: IntArray) -> IntArray:
    window = spec.extra.get("n_window")
    tower = AudioSpec(int(window or 1), None if window is None else 1)
    return audio_tokens(tower, mel_frames_N.astype(np.int64))


def _merged(name: str, grid_N3: IntArray, merge: int) -> IntArray:
    wrong_N = (grid_N3 < 1).any(axis=1) | (grid_N3[:, 1:] % merge != 0).any(axis=1)
    wrong_N |= (grid_N3 > 1 << 20).any(axis=1)
    if wrong_N.any():
        ordinal = int(wrong_N.argmax())
        raise MRopeError(
            f"{name}[{ordinal}] = {grid_N3[ordinal].tolist()}: sizes must be at least 1, height "
            f"and width multiples of spatial_merge_size={merge}"
        )
    merged_N3: IntArray = grid_N3 // np.array([1, merge, merge])
    return merged_N3


def _refuse_huge(media: Media, tokens: int) -> None:
    """Refuse sizes beyond the batch before a block is made of one; below 2**16 the row is named."""
    limit = max(tokens, 1 << 16)
    needs = {
        "image_grid_thw": media.images.prod(axis=1),
        "video_grid_thw": media.videos.prod(axis=1),
        "audio_seqlens": media.audios,
    }
    for name, need_N in needs.items():
        if (need_N > limit).any():
            ordinal = int((need_N > limit).argmax())
            raise MRopeError(
                f"{name}[{ordinal}] needs {need_N[ordinal]} tokens, more than the {tokens} of the "
                "whole batch"
            )


def _as_counts(name: str, counts: npt.ArrayLike | None, rows: int) -> list[int] | None:
    if counts is None:
        return None
    array = as_integers(name, counts, "how many of them each row has")
    if array.shape != (rows,):
        raise MRopeError(f"{name} = {array.tolist()} does not fit a batch of {rows} rows")
    return [int(count) for count in array]
