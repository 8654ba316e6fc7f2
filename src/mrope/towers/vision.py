"""Compute what a vision tower, or an attached model behind it, would derive from sizes.

`PRODUCTS` has everything that some tower reads; a tower's row names those that it reads itself. A
new tensor is one more product, and its name in the rows of the towers that take it.

All tensors are functions of `*_grid_thw` and of a few values of the config. Apart from offsets,
what a frame contributes depends only on its height and width, so each distinct size is computed
once and cached, and a batch is a concatenation.

Source: `transformers.vision_utils` 5.23; crops: `MiniCPMV4_7VisionModel`, transformers 5.24. Crops
are thumbnails and slices of images and frames: frames of their own, whose patches stand side by
side, in raster order within each.

Shape suffixes: N grids, F frames of all grids, P patches of all frames, M merged tokens of all
frames, W attention windows, L positions along an axis. Within one frame: h, w patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mrope.arrays import Array, as_grid, borders, starts, within
from mrope.columns import NewColumns
from mrope.errors import MRopeError
from mrope.towers.frame_cache import FRAME_CACHE, Frames, Piece

if TYPE_CHECKING:
    from mrope.towers.vision_spec import VisionSpec

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]


Tensors = Mapping[str, Array | int | list[Any]]


class Product(NamedTuple):
    """One or more tensors that are computed together.

    Attributes:
        keys: names of its tensors, without the prefix `image_` or `video_`.
        make: `(spec, frames) -> tensors`, of at least one frame, whose sizes are divisible by
            `spec.spatial_merge_size`. The arrays are writable and never shared.
        needs: field of `VisionSpec` without which there is no such tensor.
        own: whether the tower takes its tensors as keywords; otherwise an attached model reads it.
        fixed: whether its tensors can be padded to a fixed shape: they are of patches, merged
            tokens or segments alone.
    """

    keys: tuple[str, ...]
    make: Callable[[Any, Frames], Tensors]
    needs: str | None = None
    own: bool = True
    fixed: bool = True


def frame_borders(frames: Frames) -> Tensors:
    """Compute the attention segments, one per frame, as offsets into the patches.

    Returns:
        `cu_seqlens` int32 (F + 1,), `max_seqlen` int.

    Example:
        >>> frame_borders(to_frames([[3, 2, 2]], 2))["cu_seqlens"].tolist()
        [0, 4, 8, 12]
    """
    longest = max(height * width for height, width in frames.distinct)
    return {"cu_seqlens": borders(frames.patches_F, np.int32), "max_seqlen": longest}


def patch_positions(frames: Frames, merge: int) -> Tensors:
    """Compute row and column of each patch within its frame: `position_ids` int64 (P, 2).

    Patches are in blocks of `merge` x `merge`, in raster order of blocks and within each block.
    """
    (positions_P2,) = FRAME_CACHE.join(_positions, frames, merge)
    return {"position_ids": positions_P2}


def block_index(grid_thw: npt.ArrayLike, merge: int) -> Int64Array:
    """Compute the permutation from patches in raster order to merged blocks, int64 (P,).

    Example:
        >>> block_index([[1, 2, 4]], 2).tolist()
        [0, 1, 4, 5, 2, 3, 6, 7]
    """
    frames = to_frames(grid_thw, merge)
    (positions_P2,) = FRAME_CACHE.join(_positions, frames, merge)
    row_P, column_P = positions_P2.T
    width_P = frames.width_F.repeat(frames.patches_F)
    first_P = starts(frames.patches_F).repeat(frames.patches_F)
    index_P: Int64Array = row_P * width_P + column_P + first_P
    return index_P


def pair_index(grid_thw: npt.ArrayLike, merge: int) -> Int64Array:
    """Compute the merged tokens that ERNIE-4.5-VL's resampler joins, int64 (2, M).

    Frames 0 and 1, 2 and 3, and so on of a clip are joined token by token. A last frame without a
    partner is left out, and an image is its own partner.

    Example:
        >>> pair_index([[2, 2, 4], [1, 2, 2]], 2).tolist()
        [[0, 1, 4], [2, 3, 4]]
    """
    frames = to_frames(grid_thw, merge)
    frames_N, size_F = frames.grid_N3[:, 0], frames.patches_F // merge**2
    ordinal_F = within(frames_N)
    alone_F = (frames_N == 1).repeat(frames_N)
    leads_F = alone_F | ((ordinal_F % 2 == 0) & (ordinal_F + 1 < frames_N.repeat(frames_N)))
    size_L = size_F[leads_F]
    start_L = starts(size_F)[leads_F] - starts(size_L)
    first_M = start_L.repeat(size_L) + np.arange(size_L.sum())
    partner_M = np.where(alone_F[leads_F], 0, size_L).repeat(size_L)
    return np.stack((first_M, first_M + partner_M))


def window_order(frames: Frames, merge: int, side: int) -> Tensors:
    """Compute the permutation of merged tokens into attention windows, and the windows' borders.

    A frame is cut into windows of `side` x `side` merged tokens, smaller at its right and lower
    edge. Windows are in raster order, and so are the tokens within each.

    Returns:
        `window_index` int64 (M,), merged tokens in window order, counted over all grids;
        `cu_window_seqlens` int32 (W + 1,), offsets of the windows in patches; `max_window_seqlen`
        int, the largest window.
    """
    order_M, lengths_W = FRAME_CACHE.join(_windows, frames, merge, side)
    tokens_F = frames.patches_F // merge**2
    # In place: what was joined is new, so this never writes into a cached piece.
    order_M += starts(tokens_F).repeat(tokens_F)
    return {
        "window_index": order_M,
        "cu_window_seqlens": borders(lengths_W, np.int32),
        "max_window_seqlen": int(lengths_W.max()),
    }


def neighbour_offsets(frames: Frames, merge: int, side: int) -> Tensors:
    """Compute how far from each patch those lie that a convolution over its frame adds up.

    Patches are in the order of `patch_positions`.

    Args:
        side: weights along each side of the convolution; odd.

    Returns:
        `neighbour_offsets` int32 (P, side * side): by the rows of weights, from a patch to its
        neighbour; 0 to itself, and where the frame has none.

    Example:
        >>> neighbour_offsets(to_frames([[1, 1, 3]], 1), 1, 3)["neighbour_offsets"].tolist()
        [[0, 0, 0, 0, 0, 1, 0, 0, 0], [0, 0, 0, -1, 0, 1, 0, 0, 0], [0, 0, 0, -1, 0, 0, 0, 0, 0]]
    """
    (offsets_PK,) = FRAME_CACHE.join(_offsets, frames, merge, side)
    return {"neighbour_offsets": offsets_PK}


def table_taps(frames: Frames, merge: int, side: int, corners: bool = True) -> Tensors:
    """Compute the four learned positions that each patch interpolates, and their weights.

    The table of `side` x `side` positions is interpolated bilinearly to the size of each frame.
    `corners` is torch's `align_corners`: corner centres coincide; otherwise outer edges do. Taps
    are upper left, upper right, lower left, lower right; patches are in the order of
    `patch_positions`.

    Returns:
        `interp_indices` int64 (P, 4), into the flat table, and `interp_weights` float32 (P, 4).
    """
    indices_P4, weights_P4 = FRAME_CACHE.join(_taps, frames, merge, side, corners)
    return {"interp_indices": indices_P4, "interp_weights": weights_P4}


def to_frames(grid_thw: npt.ArrayLike | None, merge: int) -> Frames:
    """Return the frames of grids (N, 3), whose heights and widths are multiples of the merge.

    Raises:
        MRopeError: they are not, or a size is below 1.
    """
    grid_N3 = as_grid("grid_thw", grid_thw)
    small = np.minimum.reduce(grid_N3, axis=None, initial=1) < 1
    if small or np.count_nonzero(grid_N3[:, 1:] % merge):
        wrong_N = (grid_N3 < 1).any(axis=1) | (grid_N3[:, 1:] % merge != 0).any(axis=1)
        ordinal = int(wrong_N.argmax())
        raise MRopeError(
            f"grid_thw[{ordinal}] = {grid_N3[ordinal].tolist()}: sizes must be at least 1, height "
            f"and width multiples of spatial_merge_size={merge}. Likely cause: a grid of another "
            "processor."
        )
    frames, heights, widths = grid_N3.T.tolist()
    size_N = list(zip(heights, widths, strict=True))
    # Images alone need no repetition.
    size_F = size_N if sum(frames) == len(frames) else [*chain(*map(repeat, size_N, frames))]
    patches_F = (grid_N3[:, 1] * grid_N3[:, 2]).repeat(grid_N3[:, 0])
    return Frames(grid_N3, size_F, set(size_N), patches_F)


def _positions(height: int, width: int, merge: int) -> Piece:
    positions = np.empty((height // merge, width // merge, merge, merge, 2), np.int64)
    positions[..., 0] = np.arange(height).reshape(-1, 1, merge, 1)
    positions[..., 1] = np.arange(width).reshape(-1, 1, merge)
    return (positions.reshape(-1, 2),)


def _offsets(height: int, width: int, merge: int, side: int) -> Piece:
    (positions_P2,) = FRAME_CACHE.recall(_positions, height, width, merge)
    row_P, column_P = positions_P2.T
    # With a margin, where there is no patch: -1.
    reach = side // 2
    place = np.full((height + 2 * reach, width + 2 * reach), -1)
    own_P = np.arange(len(positions_P2))
    place[row_P + reach, column_P + reach] = own_P
    step_K = np.arange(side)
    rows_PK = row_P[:, None] + step_K.repeat(side)
    neighbour_PK = place[rows_PK, column_P[:, None] + np.tile(step_K, side)]
    offsets_PK = np.where(neighbour_PK < 0, 0, neighbour_PK - own_P[:, None])
    return (offsets_PK.astype(np.int32),)


def _windows(height: int, width: int, merge: int, side: int) -> Piece:
    row_L = np.arange(height // merge) // side
    column_L = np.arange(width // merge) // side
    window = (row_L[:, None] * (column_L[-1] + 1) + column_L).ravel()
    # A stable sort keeps the tokens of each window row by row.
    return window.argsort(kind="stable"), np.bincount(window) * merge**2


def _taps(height: int, width: int, merge: int, side: int, corners: bool) -> Piece:
    # Axes are cached on their own, since frames of different sizes share heights and widths.
    rows, row_weights, _, _ = FRAME_CACHE.recall(_axis_tables, height, merge, side, corners)
    _, _, columns, column_weights = FRAME_CACHE.recall(_axis_tables, width, merge, side, corners)
    shape = (height // merge, width // merge, merge, merge * 4)
    # Through `out`, without temporaries of the size of the result.
    indices, weights = np.empty(shape, np.int64), np.empty(shape, np.float32)
    np.add(_down(rows, merge), _along(columns, merge), out=indices)
    np.multiply(_down(row_weights, merge), _along(column_weights, merge), out=weights)
    return indices.reshape(-1, 4), weights.reshape(-1, 4)


def _down(values: Array, merge: int) -> Array:
    return values.reshape(-1, 1, merge, values.shape[1])


def _along(values: Array, merge: int) -> Array:
    return values.reshape(1, -1, 1, merge * values.shape[1])


def _axis_tables(length: int, merge: int, side: int, corners: bool) -> Piece:
    """Compute taps and weights along one axis, laid out for a frame's rows and for its columns.

    For columns the layout is (L, 4): both taps, twice. For rows it is (L, merge * 4): each tap
    twice, repeated for the `merge` patches of a block's row, which gives numpy the longest possible
    inner loop. Row taps are multiplied by the table's width already.

    Example:
        >>> rows, _, columns, _ = _axis_tables(2, 1, 3, True)
        >>> rows.tolist(), columns.tolist()
        ([[0, 0, 3, 3], [6, 6, 6, 6]], [[0, 1, 0, 1], [2, 2, 2, 2]])
    """
    taps_L2, weights_L2 = _axis_taps(length, side, corners)
    return (
        np.tile((taps_L2 * side).repeat(2, axis=1), merge),
        np.tile(weights_L2.repeat(2, axis=1), merge),
        np.tile(taps_L2, 2),
        np.tile(weights_L2, 2),
    )


def _axis_taps(length: int, side: int, corners: bool) -> tuple[Int64Array, FloatArray]:
    """Compute the two table rows around each of `length` positions, and their weights, (L, 2) each.

    A tap beyond the table is clipped to its edge and keeps its weight.
    """
    # Operations and their order are torch's, all float32: any other order rounds differently.
    source_L = np.arange(length, dtype=np.float32)
    if corners:
        source_L = source_L * np.float32(side - 1) / np.float32(max(length - 1, 1))
    else:
        half = np.float32(0.5)
        source_L = (source_L + half) * np.float32(side) / np.float32(length) - half
    floor_L = np.floor(source_L)
    step_2 = np.arange(2)
    taps_L2 = (floor_L.astype(np.int64)[:, None] + step_2).clip(0, side - 1)
    distance_L2 = np.abs((source_L - floor_L)[:, None] - step_2.astype(np.float32))
    return taps_L2, np.float32(1) - distance_L2


# Patches along each side of a crop's window, and of what the merger makes a token of.
_SIDE = 2


def merges_windows(merge: int) -> bool:
    """Whether the tower merges windows within its layers: it does unless tokens are 2 x 2 patches.

    Args:
        merge: patches along each side that share a token, 2 or 4.
    """
    return merge == _SIDE**2


def nearest_positions(side: int, frames: Frames) -> Int64Array:
    """Compute the learned position that is nearest to each patch, int64 (P,).

    Args:
        side: learned positions along each side of the tower's table.

    Example:
        >>> nearest_positions(4, to_frames([[1, 2, 4]], 1)).tolist()
        [0, 1, 2, 3, 8, 9, 10, 11]
    """
    parts = []
    for height, width in frames.size_F:
        rows_L, columns_L = _buckets(side, height), _buckets(side, width)
        parts.append((rows_L[:, None] * side + columns_L).ravel())
    return np.concatenate(parts)


def crop_block_index(size_N3: Int64Array, merge: int) -> Int64Array:
    """Compute the order in which the merger takes what the tower returns, int64.

    Example:
        >>> crop_block_index(np.array([[1, 2, 4]]), 2).tolist()
        [0, 1, 4, 5, 2, 3, 6, 7]
    """
    # A merged window is one place of what the tower returns.
    places_N3 = size_N3 // [1, _SIDE, _SIDE] if merges_windows(merge) else size_N3
    return block_index(places_N3, _SIDE)


@lru_cache(maxsize=1024)
def _buckets(side: int, length: int) -> Int64Array:
    """Return the learned row or column that is nearest to each of `length` patches, (L,)."""
    import torch

    # torch's own borders: they are compared for equality, and other sums would round differently.
    borders = torch.arange(1 / side, 1.0, 1 / side).numpy()
    place_L = np.arange(length, dtype=np.float32) / np.float32(length)
    bucket_L: Int64Array = np.searchsorted(borders, place_L, side="right")
    return bucket_L


PRODUCTS: dict[str, Product] = {
    "borders": Product(
        ("cu_seqlens", "max_seqlen"),
        lambda _, frames: frame_borders(frames),
    ),
    "positions": Product(
        ("position_ids",),
        lambda spec, frames: patch_positions(frames, spec.spatial_merge_size),
    ),
    # A block of one patch is raster order.
    "raster_positions": Product(("position_ids",), lambda _, frames: patch_positions(frames, 1)),
    "nearest": Product(
        ("position_ids",),
        lambda spec, frames: {"position_ids": nearest_positions(spec.table_side, frames)},
        needs="table_side",
    ),
    "table": Product(
        ("interp_indices", "interp_weights"),
        lambda spec, frames: table_taps(frames, spec.spatial_merge_size, spec.table_side),
        needs="table_side",
    ),
    "raster_table": Product(
        ("interp_indices", "interp_weights"),
        lambda spec, frames: table_taps(frames, 1, spec.table_side, corners=False),
        needs="table_side",
    ),
    "raster_table_to_corners": Product(
        ("interp_indices", "interp_weights"),
        lambda spec, frames: table_taps(frames, 1, spec.table_side),
        needs="table_side",
    ),
    "windows": Product(
        ("window_index", "cu_window_seqlens", "max_window_seqlen"),
        lambda spec, frames: window_order(frames, spec.spatial_merge_size, spec.window_side),
        needs="window_side",
    ),
    "crop_windows": Product(
        ("window_index", "cu_window_seqlens", "max_window_seqlen"),
        lambda spec, frames: (
            window_order(frames, 1, _SIDE) if merges_windows(spec.spatial_merge_size) else {}
        ),
    ),
    "crop_blocks": Product(
        ("block_index",),
        lambda spec, frames: {
            "block_index": crop_block_index(frames.grid_N3, spec.spatial_merge_size)
        },
        own=False,
    ),
    "blocks": Product(
        ("block_index",),
        lambda spec, frames: {"block_index": block_index(frames.grid_N3, spec.spatial_merge_size)},
        own=False,
    ),
    "pairs": Product(
        ("pair_index",),
        lambda spec, frames: {"pair_index": pair_index(frames.grid_N3, spec.spatial_merge_size)},
        own=False,
        fixed=False,
    ),
    "neighbours": Product(
        ("neighbour_offsets",),
        lambda spec, frames: neighbour_offsets(
            frames, spec.spatial_merge_size, spec.convolution_side
        ),
        needs="convolution_side",
        own=False,
    ),
    "source_grids": Product(
        ("source_grids",),
        lambda _, frames: {"source_grids": frames.grid_N3},
        own=False,
        fixed=False,
    ),
    "host_grids": Product(
        ("grid_sizes",),
        lambda _, frames: {"grid_sizes": frames.grid_N3.tolist()},
        own=False,
        fixed=False,
    ),
}
"""Everything that some tower reads, by the names that `Tower.tensors` has."""


@lru_cache(maxsize=64)
def products_of(spec: VisionSpec) -> tuple[Product, ...]:
    """Return the products that a tower reads, in the order of its row."""
    named = [PRODUCTS[name] for name in spec.tower.tensors]
    return tuple(one for one in named if one.needs is None or getattr(spec, one.needs) is not None)


def vision_tensors(spec: VisionSpec, grid_thw: npt.ArrayLike | None) -> dict[str, Array | int]:
    """Compute every input of a vision tower beside its pixels.

    Args:
        spec: the tower's values.
        grid_thw: (N, 3) integers: frames, height and width in patches of each image, or of each
            video, in the order of their pixels; of crops, which have one frame each. None or no
            rows: no tensors, as the model does not call the tower either.

    Returns:
        The tensors under the tower's own names, `spec.keys`; empty without grids. P is the sum of
        t * h * w, M is P / spatial_merge_size ** 2.

        - `cu_seqlens` int32 (frames + 1,), `max_seqlen` int: see `frame_borders`.
        - `position_ids` int64 (P, 2): see `patch_positions`; of crops (P,): see
          `nearest_positions`.
        - `window_index` int64 (M,), of crops (P,), `cu_window_seqlens` int32 (windows + 1,),
          `max_window_seqlen` int: see `window_order`; with `spec.window_side`, and of
        - `interp_indices` int64 (P, 4), `interp_weights` float32 (P, 4): see `table_taps`; with
          `spec.table_side`.

        The arrays are writable and never shared with the cache. Values, dtypes and shapes equal
        those of `transformers.vision_utils` 5.23, bit for bit.

    Raises:
        MRopeError: grids of a wrong shape or dtype, sizes below 1 or not divisible by the merge.

    Example:
        >>> from mrope.towers import VisionSpec
        >>> tensors = vision_tensors(VisionSpec(spatial_merge_size=2), [[1, 2, 4]])
        >>> tensors["position_ids"].tolist()
        [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
        >>> tensors["cu_seqlens"].tolist(), tensors["max_seqlen"]
        ([0, 8], 8)
    """
    return tower_tensors(spec, grid_thw, own_alone=True)


def tower_tensors(
    spec: VisionSpec, grid_thw: npt.ArrayLike | None, own_alone: bool = False
) -> NewColumns:
    """Compute what `vision_tensors` returns, and what an attached model reads beside it.

    Args:
        own_alone: leave out what only attached models read.
    """
    frames = to_frames(grid_thw, spec.spatial_merge_size)
    if spec.tower.sizes == "crops" and (frames.grid_N3[:, 0] != 1).any():
        raise MRopeError(
            "this tower takes crops, which have sizes and no grids: a crop is one frame"
        )
    tensors: NewColumns = {}
    if frames.size_F:
        for product in products_of(spec):
            if product.own or not own_alone:
                tensors |= product.make(spec, frames)
    return tensors
