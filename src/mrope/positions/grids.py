"""The grids of a batch, checked and brought into one order: what `spans` matches tokens against.

Shape suffixes: N rows of a `*_grid_thw`, B rows of the batch, G spans' grids (N images, then N
videos, or their frames where a family has frames apart).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mrope.arrays import IntArray, as_grid, as_integers
from mrope.errors import MRopeError
from mrope.spec.spec import MRopeSpec


class Grids(NamedTuple):
    """One grid for each span, in merged units; images first, then videos or their frames.

    Attributes:
        size_3G: frames, merged height and merged width; the product is the span's token count.
        images: how many of the G are images.
        frames_N: how many of the G each video has: 1, or its frames where these stand apart.
        row_G: row of the batch that each belongs to, -1 where the batch does not say; None where it
            says so for none.
        merge, frame_merge: patches along a side, and frames of a video, that share a token; for
            messages.
    """

    size_3G: IntArray
    images: int
    frames_N: IntArray
    row_G: IntArray | None
    merge: int
    frame_merge: int


def to_grids(
    spec: MRopeSpec,
    image_grid_thw: npt.ArrayLike | None,
    video_grid_thw: npt.ArrayLike | None,
    images_per_sample: npt.ArrayLike | None,
    videos_per_sample: npt.ArrayLike | None,
    shape: tuple[int, int],
) -> Grids:
    """Check the grids of a batch and merge them.

    Args:
        image_grid_thw, video_grid_thw: (N, 3) integers, frames, height and width in patches.
        images_per_sample, videos_per_sample: (B,) how many of them each row has.
        shape: (B, S) of the batch.

    Raises:
        MRopeError: a grid of a wrong shape, dtype or size; counts that do not add up.
    """
    image_N3 = as_grid("image_grid_thw", image_grid_thw)
    video_N3 = as_grid("video_grid_thw", video_grid_thw)
    images = len(image_N3)
    size_3G = np.concatenate((image_N3, video_N3)).T.copy()
    _check_sizes(size_3G, images, spec.spatial_merge_size, shape)
    size_3G[1:] //= spec.spatial_merge_size
    frame_merge = int(spec.extra.get("temporal_merge_size", 1))
    if frame_merge != 1:
        size_3G[0, images:] //= frame_merge
        _check_clips(size_3G[0, images:], video_N3, frame_merge)
    if spec.family_row.frames_apart and len(video_N3):
        frames_N = size_3G[0, images:].copy()
        if int(frames_N.sum()) > shape[0] * shape[1]:
            frames_N = _clipped(frames_N, shape[0] * shape[1])
        size_3G[0, images:] = 1
        frames_3G = size_3G[:, images:].repeat(frames_N, axis=1)
        size_3G = np.concatenate((size_3G[:, :images], frames_3G), axis=1)
    else:
        frames_N = np.ones(len(video_N3), np.int64)
    row_G = None
    if images_per_sample is not None or videos_per_sample is not None:
        image_rows = _rows_of("images_per_sample", images_per_sample, images, shape[0])
        video_rows = _rows_of("videos_per_sample", videos_per_sample, len(video_N3), shape[0])
        row_G = np.concatenate((image_rows, video_rows.repeat(frames_N)))
    return Grids(size_3G, images, frames_N, row_G, spec.spatial_merge_size, frame_merge)


def _check_sizes(size_3G: IntArray, images: int, merge: int, shape: tuple[int, int]) -> None:
    """Refuse sizes below 1, above what the batch could hold, or not divisible by `merge`.

    A size beyond the batch cannot match its tokens; refused here, products of sizes stay in int64.
    """
    if size_3G.shape[1] == 0:
        return
    # Below 2**16 products do not overflow, and the error that names row and span can be had.
    limit = merge * max(shape[0] * shape[1], 1 << 16)
    # Seen as unsigned, size - 1 is huge for 0 and below: one comparison checks both ends.
    outside = np.count_nonzero((size_3G - 1).view(np.uint64) >= limit)
    if not outside and not np.count_nonzero(size_3G[1:] % merge):
        return
    for ordinal, size in enumerate(size_3G.T.tolist()):
        name = "image_grid_thw" if ordinal < images else "video_grid_thw"
        where = f"{name}[{ordinal if ordinal < images else ordinal - images}] = {size}"
        if min(size) < 1:
            raise MRopeError(f"{where}: every size must be at least 1")
        if size[1] % merge or size[2] % merge:
            raise MRopeError(
                f"{where}: height and width in patches must be multiples of "
                f"spatial_merge_size={merge}; usual cause: a grid of another processor"
            )
        if max(size) > limit:
            raise MRopeError(
                f"{where}: needs more than the {shape[0] * shape[1]} tokens of the whole batch"
            )


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


def _rows_of(name: str, per_sample: npt.ArrayLike | None, grids: int, rows: int) -> IntArray:
    """Return the row of each grid: counts [2, 0, 1] give rows [0, 0, 2]; no counts give -1."""
    if per_sample is None:
        return np.full(grids, -1)
    counts = as_integers(name, per_sample, "how many grids each row has")
    # Each within bounds first: the sum of two beyond them may wrap around to the right one.
    inside = counts.shape == (rows,) and bool(((counts >= 0) & (counts <= grids)).all())
    if not inside or counts.sum() != grids:
        raise MRopeError(
            f"{name} = {counts.tolist()} does not fit a batch of {rows} rows and {grids} grids"
        )
    return np.arange(rows).repeat(counts)
