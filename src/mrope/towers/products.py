"""Compute what a vision tower, or an attached model behind it, would derive from sizes.

`PRODUCTS` has everything that some tower reads; a tower's row names those that it reads itself. A
new tensor is one more product, and its name in the rows of the towers that take it.

Shape suffixes: N grids, F frames of all grids, P patches of all frames, M merged tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mrope.errors import MRopeError
from mrope.towers import crops, vision
from mrope.towers.vision import Int64Array, as_sizes

if TYPE_CHECKING:
    from mrope.towers.vision_spec import VisionSpec

Tensors = Mapping[str, npt.NDArray[Any] | int | list[Any]]


class Product(NamedTuple):
    """One or more tensors that are computed together.

    Attributes:
        keys: names of its tensors, without the prefix `image_` or `video_`.
        make: `(spec, size_N3) -> tensors`, at least one size, each at least 1 and divisible by
            `spec.spatial_merge_size`. The arrays are writable and never shared.
        needs: field of `VisionSpec` without which there is no such tensor.
        own: whether the tower takes its tensors as keywords; otherwise an attached model reads it.
        fixed: whether its tensors can be padded to a fixed shape: they are of patches, merged
            tokens or segments alone.
    """

    keys: tuple[str, ...]
    make: Callable[[VisionSpec, Int64Array], Tensors]
    needs: str | None = None
    own: bool = True
    fixed: bool = True


def _borders(_: VisionSpec, size_N3: Int64Array) -> Tensors:
    return _segments("", vision.frame_borders(size_N3))


def _positions(spec: VisionSpec, size_N3: Int64Array) -> Tensors:
    return {"position_ids": vision.patch_positions(size_N3, spec.spatial_merge_size)}


def _raster_positions(_: VisionSpec, size_N3: Int64Array) -> Tensors:
    # A block of one patch is raster order.
    return {"position_ids": vision.patch_positions(size_N3, 1)}


def _windows(spec: VisionSpec, size_N3: Int64Array) -> Tensors:
    assert spec.window_side is not None  # `needs`
    order_M, borders = vision.window_order(size_N3, spec.spatial_merge_size, spec.window_side)
    return {"window_index": order_M, **_segments("window_", borders)}


def _table(spec: VisionSpec, size_N3: Int64Array) -> Tensors:
    return _taps(spec, size_N3, spec.spatial_merge_size, corners=True)


def _raster_table(spec: VisionSpec, size_N3: Int64Array) -> Tensors:
    return _taps(spec, size_N3, 1, corners=False)


def _taps(spec: VisionSpec, size_N3: Int64Array, block: int, corners: bool) -> Tensors:
    assert spec.table_side is not None  # `needs`
    indices_P4, weights_P4 = vision.table_taps(size_N3, block, spec.table_side, corners)
    return {"interp_indices": indices_P4, "interp_weights": weights_P4}


def _nearest(spec: VisionSpec, size_N3: Int64Array) -> Tensors:
    assert spec.table_side is not None  # `needs`
    return {"position_ids": crops.nearest_positions(spec.table_side, size_N3)}


def _crop_windows(spec: VisionSpec, size_N3: Int64Array) -> Tensors:
    if not crops.merges_windows(spec.spatial_merge_size):
        return {}
    order_P, borders = vision.window_order(size_N3, 1, crops.SIDE)
    return {"window_index": order_P, **_segments("window_", borders)}


def _crop_blocks(spec: VisionSpec, size_N3: Int64Array) -> Tensors:
    return {"block_index": crops.crop_block_index(size_N3, spec.spatial_merge_size)}


def _blocks(spec: VisionSpec, size_N3: Int64Array) -> Tensors:
    return {"block_index": vision.block_index(size_N3, spec.spatial_merge_size)}


def _pairs(spec: VisionSpec, size_N3: Int64Array) -> Tensors:
    return {"pair_index": vision.pair_index(size_N3, spec.spatial_merge_size)}


def _source_grids(_: VisionSpec, size_N3: Int64Array) -> Tensors:
    return {"source_grids": size_N3}


def _grid_sizes(_: VisionSpec, size_N3: Int64Array) -> Tensors:
    return {"grid_sizes": size_N3.tolist()}


def _segments(which: str, borders: npt.NDArray[np.int32]) -> Tensors:
    """Return borders of attention segments, and the longest of them."""
    return {f"cu_{which}seqlens": borders, f"max_{which}seqlen": int(np.diff(borders).max())}


_BORDERS = ("cu_seqlens", "max_seqlen")
_WINDOWS = ("window_index", "cu_window_seqlens", "max_window_seqlen")
_TABLE = ("interp_indices", "interp_weights")

PRODUCTS: dict[str, Product] = {
    "borders": Product(_BORDERS, _borders),
    "positions": Product(("position_ids",), _positions),
    "raster_positions": Product(("position_ids",), _raster_positions),
    "windows": Product(_WINDOWS, _windows, "window_side"),
    "table": Product(_TABLE, _table, "table_side"),
    "raster_table": Product(_TABLE, _raster_table, "table_side"),
    "nearest": Product(("position_ids",), _nearest, "table_side"),
    "crop_windows": Product(_WINDOWS, _crop_windows),
    "crop_blocks": Product(("block_index",), _crop_blocks, own=False),
    "blocks": Product(("block_index",), _blocks, own=False),
    "pairs": Product(("pair_index",), _pairs, own=False, fixed=False),
    "source_grids": Product(("source_grids",), _source_grids, own=False, fixed=False),
    "host_grids": Product(("grid_sizes",), _grid_sizes, own=False, fixed=False),
}
"""Everything that some tower reads, by the names that `Tower.tensors` has."""


@lru_cache(maxsize=64)
def products_of(spec: VisionSpec) -> tuple[Product, ...]:
    """Return the products that a tower reads, in the order of its row."""
    named = [PRODUCTS[name] for name in spec.tower.tensors]
    return tuple(one for one in named if one.needs is None or getattr(spec, one.needs) is not None)


def vision_tensors(
    spec: VisionSpec, grid_thw: npt.ArrayLike | None
) -> dict[str, npt.NDArray[Any] | int]:
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
          `max_window_seqlen` int: see `window_order`; with `spec.window_side`, and of crops.
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
) -> dict[str, Any]:
    """Compute what `vision_tensors` returns, and what an attached model reads beside it.

    Args:
        own_alone: leave out what only attached models read.
    """
    size_N3 = as_sizes(grid_thw, spec.spatial_merge_size)
    if spec.tower.sizes == "crops" and (size_N3[:, 0] != 1).any():
        raise MRopeError(
            "this tower takes crops, which have sizes and no grids: a crop is one frame"
        )
    tensors: dict[str, Any] = {}
    if len(size_N3):
        for product in products_of(spec):
            if product.own or not own_alone:
                tensors |= product.make(spec, size_N3)
    return tensors
