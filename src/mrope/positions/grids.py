"""Check the grids of a batch and bring them into one order, to be matched with tokens.

Shape suffixes: N rows of a `*_grid_thw`, B rows of the batch, G spans' grids (N images, then N
videos, or their frames where a family has frames apart).
"""

from __future__ import annotations

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
        size_3G: frames, merged height and merged width, newline column included; the product is the
            span's token count.
        images: how many of the G are images, or their frames where these are spans.
        frames_N: how many of the G each video has: 1, or its frames where these are spans.
        row_G: row of the batch that each belongs to, -1 if unknown; None if no counts were given.
        moves: whether any span has more than one frame, so that time advances inside it.
        merge, frame_merge, newlines: patches along a side, and frames of a video, that share a
            token, and newline columns, 0 or 1; for messages.
    """

    size_3G: IntArray
    images: int
    frames_N: IntArray
    row_G: IntArray | None
    moves: bool
    merge: int
    frame_merge: int
    newlines: int


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
    size_3G = _merged(spec, image.size_N3, video.size_N3, tokens)
    if (clips and not row.video_keys) or row.still_images:
        _refuse_unknown_media(spec, image.size_N3, video.size_N3)
    frame_merge = int(spec.extra.get("temporal_merge_size", 1))
    if frame_merge != 1:
        size_3G[0, images:] //= frame_merge
        _check_clips(size_3G[0, images:], video.size_N3, frame_merge)
    spans_N = np.ones(images + clips, np.int64)
    if row.frames_apart and (clips or row.newlines):
        first = 0 if row.newlines else images
        size_3G = _apart(size_3G, spans_N, first, tokens)
    row_G = None
    if image.count_B is not None or video.count_B is not None:
        rows_N = [rows_of(image, "image", rows), rows_of(video, "video", rows)]
        row_G = np.concatenate(rows_N).repeat(spans_N)
    return Grids(
        size_3G,
        int(np.add.reduce(spans_N[:images])),
        spans_N[images:],
        row_G,
        bool(np.maximum.reduce(size_3G[0], initial=1) > 1),
        spec.spatial_merge_size,
        frame_merge,
        int(row.newlines),
    )


def _apart(size_3N: IntArray, spans_N: IntArray, first: int, tokens: int) -> IntArray:
    """Give each frame a column of its own, and write the frames of each grid to `spans_N`.

    Args:
        first: grids before this one keep their frames together.

    Example: a grid of 2 frames of 3 x 4 becomes two columns (1, 3, 4).
    """
    spans_N[first:] = size_3N[0, first:]
    if np.add.reduce(spans_N[first:]) > tokens:
        spans_N[first:] = _clipped(spans_N[first:], tokens)
    size_3G: IntArray = size_3N.repeat(spans_N, axis=1)
    size_3G[0, first:] = 1
    return size_3G


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


def rows_of(media: Media, modality: str, rows: int) -> IntArray:
    """Return the row of each item: counts [2, 0, 1] give rows [0, 0, 2]; no counts give -1.

    Raises:
        MRopeError: not one count for each row, or counts that do not add up to the sizes.
    """
    counts, sizes = media.count_B, len(media.size_N3)
    if counts is None:
        return np.full(sizes, -1)
    # As Python ints, of which a batch has few, and whose sum does not wrap around.
    each = counts.tolist()
    if counts.shape != (rows,) or min(each, default=0) < 0 or sum(each) != sizes:
        raise MRopeError(
            f"{count_key(modality)} = {counts.tolist()} does not fit a batch of {rows} rows and "
            f"{sizes} grids"
        )
    return np.arange(rows).repeat(counts)


def _merged(spec: MRopeSpec, image_N3: IntArray, video_N3: IntArray, tokens: int) -> IntArray:
    """Return frames, merged height and merged width of each grid, (3, G), images first."""
    merge, images = spec.spatial_merge_size, len(image_N3)
    size_3G: IntArray = np.empty((3, images + len(video_N3)), np.int64)
    size_3G[:, :images] = image_N3.T
    size_3G[:, images:] = video_N3.T
    merged_2G, rest_2G = np.divmod(size_3G[1:], merge)
    # A size beyond the batch cannot match its tokens; refused here, products of sizes stay in
    # int64. Below 2**16 they do too, and the error that names row and span can be had.
    limit = merge * max(tokens, 1 << 16)
    outside = size_3G.min(initial=1) < 1 or size_3G.max(initial=1) > limit
    if outside or np.count_nonzero(rest_2G):
        raise _wrong_size(size_3G, images, merge, limit, tokens)
    size_3G[1:] = merged_2G
    if spec.family_row.newlines:
        size_3G[2] += 1
    return size_3G


def _wrong_size(size_3G: IntArray, images: int, merge: int, limit: int, tokens: int) -> MRopeError:
    """Return the error for the first size below 1, not divisible, or beyond the batch."""
    for ordinal, size in enumerate(size_3G.T.tolist()):
        name = "image_grid_thw" if ordinal < images else "video_grid_thw"
        where = f"{name}[{ordinal if ordinal < images else ordinal - images}] = {size}"
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
