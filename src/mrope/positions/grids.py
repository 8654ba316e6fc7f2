"""Check the grids of a batch and bring them into one order, to be matched with tokens.

Shape suffixes: N rows of a `*_grid_thw`, B rows of the batch, G spans' grids (N images, then N
videos, or their frames where a family has frames apart).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mrope.arrays import IntArray, as_integers
from mrope.errors import MRopeError
from mrope.positions.inputs import BatchInputs
from mrope.spec.spec import MRopeSpec


class Grids(NamedTuple):
    """One grid for each span, in merged units: images first, then videos or their frames.

    Attributes:
        size_3G: frames, merged height and merged width; the product is the span's token count.
        images: how many of the G are images.
        frames_N: how many of the G each video has: 1, or its frames where these are spans.
        row_G: row of the batch that each belongs to, -1 if unknown; None if no counts were given.
        moves: whether any span has more than one frame, so that time advances inside it.
        merge, frame_merge: patches along a side, and frames of a video, that share a token; for
            messages.
    """

    size_3G: IntArray
    images: int
    frames_N: IntArray
    row_G: IntArray | None
    moves: bool
    merge: int
    frame_merge: int


def to_grids(spec: MRopeSpec, inputs: BatchInputs) -> Grids:
    """Check the grids of a batch and divide them by the merge size.

    Raises:
        MRopeError: a size below 1, not divisible, or beyond the batch; counts that do not add up.
    """
    image_N3, video_N3 = inputs.image_grid_thw, inputs.video_grid_thw
    rows, tokens, images = inputs.shape[0], inputs.input_ids.size, len(image_N3)
    size_3G = _merged(spec, image_N3, video_N3, tokens)
    frame_merge = int(spec.extra.get("temporal_merge_size", 1))
    if frame_merge != 1:
        size_3G[0, images:] //= frame_merge
        _check_clips(size_3G[0, images:], video_N3, frame_merge)
    if spec.family_row.frames_apart and len(video_N3):
        frames_N = size_3G[0, images:]
        if np.add.reduce(frames_N) > tokens:
            frames_N = _clipped(frames_N, tokens)
        spans_G = size_3G[0].copy()
        spans_G[:images] = 1
        spans_G[images:] = frames_N
        size_3G = size_3G.repeat(spans_G, axis=1)
        size_3G[0, images:] = 1
    else:
        frames_N = np.ones(len(video_N3), np.int64)
    row_G = None
    if inputs.images_per_sample is not None or inputs.videos_per_sample is not None:
        image_rows = rows_of("images_per_sample", inputs.images_per_sample, images, rows)
        video_rows = rows_of("videos_per_sample", inputs.videos_per_sample, len(video_N3), rows)
        row_G = np.concatenate((image_rows, video_rows.repeat(frames_N)))
    moves = bool(size_3G[0].max(initial=1) > 1)
    return Grids(size_3G, images, frames_N, row_G, moves, spec.spatial_merge_size, frame_merge)


def rows_of(name: str, per_sample: npt.ArrayLike | None, sizes: int, rows: int) -> IntArray:
    """Return the row of each grid: counts [2, 0, 1] give rows [0, 0, 2]; no counts give -1.

    Raises:
        MRopeError: not one count for each row, or counts that do not add up to `sizes`.
    """
    if per_sample is None:
        return np.full(sizes, -1)
    counts = as_integers(name, per_sample, "how many grids each row has")
    # Each within bounds first: the sum of two beyond them may wrap around to the right one.
    inside = counts.shape == (rows,) and bool(((counts >= 0) & (counts <= sizes)).all())
    if not inside or counts.sum() != sizes:
        raise MRopeError(
            f"{name} = {counts.tolist()} does not fit a batch of {rows} rows and {sizes} grids"
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
                f"spatial_merge_size={merge}; usual cause: a grid of another processor"
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
            f"{frame_merge} frames, temporal_merge_size; usual cause: a grid of another processor"
        )


def _clipped(frames_N: IntArray, tokens: int) -> IntArray:
    """Leave out the frames behind the first that the tokens of the batch cannot hold.

    The clip is refused either way, and a size of 2**16 frames would become as many columns.
    """
    before_N = np.minimum(frames_N.cumsum() - frames_N, tokens + 1)
    clipped_N: IntArray = np.minimum(frames_N, tokens + 1 - before_N)
    return clipped_N
