"""Images, videos and audios of an Omni batch: their sizes checked, and taken one after another.

Shape suffixes: N images, videos or audios of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mrope.arrays import IntArray
from mrope.columns import MODALITIES, count_key
from mrope.errors import MRopeError, SpanMismatchError, counted
from mrope.positions.inputs import SECONDS, BatchInputs, Media
from mrope.spec.spec import MRopeSpec
from mrope.towers import AudioSpec, audio_tokens

# Far beyond any clip, and within what float32 counts without gaps.
_MAX_TIME = 2**23
_CUT = "tokens were truncated away and sizes kept"


class Sizes(NamedTuple):
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

    def __init__(self, media: Sizes, per_row: Mapping[str, list[int] | None]) -> None:
        self.media = media
        self.row = 0
        self._per_row = per_row
        self._taken = dict.fromkeys(MODALITIES, 0)
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

    def number(self, kind: str) -> int:
        """Return the number in the batch of the next of a kind."""
        return self._taken[kind]

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
                    f"row {self.row}: tokens for {counted(found, kind)}, but the row carries "
                    f"{counts[self.row]}. Likely cause: {cause}.",
                    row=self.row,
                    modality=kind,
                    found=found,
                    needed=counts[self.row],
                    cause=cause,
                )

    def check_all_taken(self) -> None:
        """Raise SpanMismatchError if the batch has more than its tokens took."""
        for kind in MODALITIES:
            there, taken = len(self.media.sizes(kind)), self._taken[kind]
            if taken < there:
                raise SpanMismatchError(
                    f"the batch has {counted(there, kind)}, but tokens for {taken}. "
                    f"Likely cause: {_CUT}.",
                    modality=kind,
                    found=taken,
                    needed=there,
                    cause=_CUT,
                )


def read_media(spec: MRopeSpec, inputs: BatchInputs) -> Sizes:
    """Check the sizes of a batch, and merge them.

    Raises:
        MRopeError: grids, seconds or audio lengths of a wrong shape, dtype or value.
    """
    images, videos = (_merged(inputs.media[one]) for one in ("image", "video"))
    seconds = _seconds(spec, inputs.media["video"], videos)
    sizes = Sizes(images, videos, seconds, _audio_lengths(spec, inputs.media["audio"]))
    _refuse_huge(sizes, inputs)
    return sizes


def read_counts(inputs: BatchInputs) -> dict[str, list[int] | None]:
    """Return how many images, videos and audios each row has, as far as the batch says."""
    return {kind: _as_counts(kind, inputs) for kind in MODALITIES}


def _seconds(spec: MRopeSpec, clips: Media, videos: IntArray) -> npt.NDArray[np.float32]:
    if clips.seconds_N is None and len(videos):
        raise MRopeError(f"videos need {SECONDS} (video_second_per_grid), one for each")
    seconds = np.empty(0) if clips.seconds_N is None else clips.seconds_N
    if seconds.shape != (len(videos),) or seconds.dtype.kind not in "iuf":
        raise MRopeError(
            f"{SECONDS} must be {len(videos)} numbers, one for each video, not "
            f"{seconds.dtype} {seconds.shape}"
        )
    if not (np.isfinite(seconds) & (seconds >= 0)).all():
        raise MRopeError(f"{SECONDS} must be finite and not negative: {seconds.tolist()}")
    rate = spec.extra["position_id_per_seconds"]
    long = seconds.astype(np.float64) * videos[:, 0] * rate >= _MAX_TIME
    if long.any():
        video = int(long.argmax())
        raise MRopeError(
            f"{SECONDS}[{video}] = {seconds[video]}: {videos[video, 0]} frames would end "
            f"at position {_MAX_TIME} or later, at {rate} a second"
        )
    return seconds.astype(np.float32)


def _audio_lengths(spec: MRopeSpec, audios: Media) -> IntArray:
    """Return the tokens of each audio."""
    frames = audios.size_N3[:, 0]
    tokens = _audio_tokens(spec, frames)
    if (frames < 1).any() or (tokens < 1).any():
        audio = int(((frames < 1) | (tokens < 1)).argmax())
        raise MRopeError(f"{audios.name}[{audio}] = {frames[audio]}: too short for a token")
    return tokens


def _audio_tokens(spec: MRopeSpec, mel_frames_N: IntArray) -> IntArray:
    window = spec.extra.get("n_window")
    tower = AudioSpec(int(window or 1), None if window is None else 1)
    return audio_tokens(tower, mel_frames_N.astype(np.int64))


def _merged(media: Media) -> IntArray:
    grid_N3, merge = media.size_N3, media.merge
    wrong_N = (grid_N3 < 1).any(axis=1) | (grid_N3[:, 1:] % merge != 0).any(axis=1)
    wrong_N |= (grid_N3 > 1 << 20).any(axis=1)
    if wrong_N.any():
        ordinal = int(wrong_N.argmax())
        raise MRopeError(
            f"{media.name}[{ordinal}] = {grid_N3[ordinal].tolist()}: sizes must be at least 1, "
            f"height and width multiples of spatial_merge_size={merge}"
        )
    merged_N3: IntArray = grid_N3 // np.array([1, merge, merge])
    return merged_N3


def _refuse_huge(sizes: Sizes, inputs: BatchInputs) -> None:
    """Refuse sizes beyond the batch before a block is made of one; below 2**16 the row is named."""
    tokens = inputs.input_ids.size
    limit = max(tokens, 1 << 16)
    needs = (sizes.images.prod(axis=1), sizes.videos.prod(axis=1), sizes.audios)
    for kind, need_N in zip(MODALITIES, needs, strict=True):
        if (need_N > limit).any():
            ordinal = int((need_N > limit).argmax())
            raise MRopeError(
                f"{inputs.media[kind].name}[{ordinal}] needs {need_N[ordinal]} tokens, more than "
                f"the {tokens} of the whole batch"
            )


def _as_counts(kind: str, inputs: BatchInputs) -> list[int] | None:
    counts, rows = inputs.media[kind].count_B, inputs.shape[0]
    if counts is None:
        return None
    if counts.shape != (rows,):
        raise MRopeError(
            f"{count_key(kind)} = {counts.tolist()} does not fit a batch of {rows} rows"
        )
    return [int(count) for count in counts]
