"""Check the grids of a batch and bring them into one order, to be matched with tokens.

Shape suffixes: N rows of a `*_grid_thw`, B rows of the batch, G spans' grids (N images, then N
videos, or their frames where a family has frames apart).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from mrope.arrays import IntArray, starts
from mrope.columns import count_key
from mrope.errors import MRopeError
from mrope.positions.inputs import BatchInputs, Media
from mrope.spec.spec import MRopeSpec


class Grids(NamedTuple):
    """One grid for each span, in merged units: images first, then videos or their frames.

    Attributes:
        size_3G: frames, merged height and merged width, newline column included.
        need_G: their product, the span's tokens.
        images: how many of the G are images, or their frames where these are spans.
        frames_N: how many of the G each video has: 1, or its frames where these are spans.
        spans_B: how many of the images, and of the others, each row has; None: unknown.
        moves: whether any span has more than one frame, so that time advances inside it.
        merge, frame_merge, newlines: patches along a side, and frames of a video, that share a
            token, and newline columns, 0 or 1; for messages.
    """

    size_3G: IntArray
    need_G: IntArray
    images: int
    frames_N: Sequence[int]
    spans_B: tuple[Sequence[int] | None, Sequence[int] | None]
    moves: bool
    merge: int
    frame_merge: int
    newlines: int

    @property
    def row_G(self) -> IntArray | None:
        """Row of the batch that each belongs to, -1 if unknown; None if no counts were given."""
        if self.spans_B == (None, None):
            return None
        sizes = (self.images, self.size_3G.shape[1] - self.images)
        return np.concatenate(
            [
                np.full(size, -1) if spans is None else np.arange(len(spans)).repeat(spans)
                for size, spans in zip(sizes, self.spans_B, strict=True)
            ]
        )


def to_grids(spec: MRopeSpec, inputs: BatchInputs) -> Grids:
    """Check the grids of a batch and divide them by the merge size.

    Raises:
        MRopeError: a size below 1, not divisible, or beyond the batch; videos, or images of several
            frames, where the family has none; counts that do not add up.
    """
    row, (rows, width) = spec.family_row, inputs.shape
    image, video = inputs.media["image"], inputs.media["video"]
    images, clips = len(image.size_N3), len(video.size_N3)
    tokens = rows * width
    size_3G = _merged(spec, image, video, tokens)
    if (clips and not row.video_keys) or row.still_images:
        _refuse_unknown_media(spec, image.size_N3, video.size_N3)
    frame_merge = int(spec.extra.get("temporal_merge_size", 1))
    if frame_merge != 1:
        size_3G[0, images:] //= frame_merge
        _check_clips(size_3G[0, images:], video.size_N3, frame_merge)
    image_N, frames_N = None, [1] * clips
    if row.frames_apart and (clips or row.newlines):
        size_3G, spans_N = _apart(size_3G, 0 if row.newlines else images, tokens)
        frames_N = spans_N[images:].tolist()
        if row.newlines:
            image_N = spans_N[:images].tolist()
            images = sum(image_N)
    moves = bool(np.maximum.reduce(size_3G[0], initial=1) > 1)
    area_G = size_3G[1] * size_3G[2]
    return Grids(
        size_3G,
        area_G * size_3G[0] if moves else area_G,
        images,
        frames_N,
        (
            spans_of_rows(image, "image", rows, image_N),
            spans_of_rows(video, "video", rows, frames_N),
        ),
        moves,
        spec.spatial_merge_size,
        frame_merge,
        int(row.newlines),
    )


def _apart(size_3N: IntArray, first: int, tokens: int) -> tuple[IntArray, IntArray]:
    """Give each frame a column of its own; return the columns, and how many each grid has.

    Args:
        first: grids before this one keep their frames together.

    Example: a grid of 2 frames of 3 x 4 becomes two columns (1, 3, 4).
    """
    spans_N = size_3N[0].copy()
    spans_N[:first] = 1
    if np.add.reduce(spans_N[first:]) > tokens:
        spans_N[first:] = _clipped(spans_N[first:], tokens)
    size_3G: IntArray = size_3N.repeat(spans_N, axis=1)
    size_3G[0, first:] = 1
    return size_3G, spans_N


def _refuse_unknown_media(spec: MRopeSpec, image_N3: IntArray, video_N3: IntArray) -> None:
    """Refuse videos, or images of several frames, for which the family has no rule."""
    if len(video_N3) and not spec.family_row.video_keys:
        raise MRopeError(f"{spec.family} has no videos, but video_grid_thw is given")
    frames_N = image_N3[:, 0]
    if spec.family_row.still_images and (frames_N > 1).any():
        image = int((frames_N > 1).argmax())
        raise MRopeError(
            f"image_grid_thw[{image}] has {frames_N[image]} frames, but an image of "
            f"{spec.family} has 1"
        )


def spans_of_rows(
    media: Media, modality: str, rows: int, spans_N: Sequence[int] | None = None
) -> list[int] | None:
    """Return how many spans each row has: counts [2, 0, 1] of grids with 1, 3 and 1 give 4, 0, 1.

    Args:
        spans_N: spans of each grid; None: each is one.

    Returns:
        None without counts.

    Raises:
        MRopeError: not one count for each row, or counts that do not add up to the sizes.
    """
    counts = media.count_B
    if counts is None:
        return None
    # As Python ints, of which a batch has few, and whose sum does not wrap around.
    each: list[int] = counts.tolist()
    sizes = len(media.size_N3)
    if counts.shape != (rows,) or min(each, default=0) < 0 or sum(each) != sizes:
        raise MRopeError(
            f"{count_key(modality)} = {each} does not fit a batch of {rows} rows and {sizes} grids"
        )
    if spans_N is None:
        return each
    spans = iter(spans_N)
    return [sum(islice(spans, count)) for count in each]


def _merged(spec: MRopeSpec, image: Media, video: Media, tokens: int) -> IntArray:
    """Return frames, merged height and merged width of each grid, (3, G), images first."""
    image_N3, video_N3 = image.size_N3, video.size_N3
    merge, images = spec.spatial_merge_size, len(image_N3)
    size_3G: IntArray = np.empty((3, images + len(video_N3)), np.int64)
    size_3G[:, :images] = image_N3.T
    size_3G[:, images:] = video_N3.T
    side_2G = size_3G[1:]
    merged_2G = side_2G // merge
    # A size beyond the batch cannot match its tokens; refused here, products of sizes stay in
    # int64. Below 2**16 they do too, and the error that names row and span can be had.
    limit = merge * max(tokens, 1 << 16)
    # Less 1 and as unsigned numbers, those below 1 are the largest.
    outside = np.maximum.reduce((size_3G - 1).view(np.uint64), axis=None, initial=0) >= limit
    if outside or np.count_nonzero(merged_2G * merge != side_2G):
        raise _wrong_size(size_3G, image, video, merge, limit, tokens)
    side_2G[:] = merged_2G
    if spec.family_row.newlines:
        size_3G[2] += 1
    return size_3G


def _wrong_size(
    size_3G: IntArray, image: Media, video: Media, merge: int, limit: int, tokens: int
) -> MRopeError:
    """Return the error for the first size below 1, not divisible, or beyond the batch."""
    places = [(media, at) for media in (image, video) for at in range(len(media.size_N3))]
    for (media, at), size in zip(places, size_3G.T.tolist(), strict=True):
        name = "image_grid_thw" if media is image else "video_grid_thw"
        where = f"{media.row_of(at)}{name}[{at}] = {size}"
        if min(size) < 1:
            return MRopeError(f"{where}: every size must be at least 1")
        if size[1] % merge or size[2] % merge:
            return MRopeError(
                f"{where}: height and width in patches must be multiples of "
                f"spatial_merge_size={merge}. Likely cause: a grid of another processor."
            )
        if max(size) > limit:
            return MRopeError(f"{where}: needs more than the {tokens} tokens of the whole batch")
    raise AssertionError("the caller saw a wrong size")


def _check_clips(frames_N: IntArray, video_N3: IntArray, frame_merge: int) -> None:
    """Refuse a clip of less frames than share a token: nothing would be left of it."""
    if not frames_N.all():
        ordinal = int(frames_N.argmin())
        raise MRopeError(
            f"video_grid_thw[{ordinal}] = {video_N3[ordinal].tolist()}: needs at least "
            f"{frame_merge} frames, temporal_merge_size. Likely cause: a grid of another processor."
        )


def _clipped(frames_N: IntArray, tokens: int) -> IntArray:
    """Leave out the frames behind the first that the tokens of the batch cannot hold.

    The clip is refused either way, and a size of 2**16 frames would become as many columns.
    """
    before_N = np.minimum(starts(frames_N), tokens + 1)
    clipped_N: IntArray = np.minimum(frames_N, tokens + 1 - before_N)
    return clipped_N
