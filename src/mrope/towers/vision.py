"""Step 6 of the way: what a vision tower would compute from its grids, computed in the worker.

Everything here is a function of `*_grid_thw` and of a few numbers of the config. A frame's share
depends on its height and width alone, so it is computed once for each distinct size, remembered,
and a batch is the concatenation of its frames' shares.

The functions for a single tensor take grids as `vision_tensors` has checked them: int64 (N, 3), at
least one row.

Shape suffixes: N grids, F frames of all grids, P patches of all frames, M merged tokens of all
frames, W attention windows, L positions along an axis. Within one frame: h, w patches.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import numpy as np
import numpy.typing as npt

from mrope.arrays import as_grid
from mrope.errors import MRopeError
from mrope.spec.families import FAMILIES, ONE_DIMENSIONAL, Tower
from mrope.spec.model_config import as_mapping, model_section, read_int
from mrope.spec.references import as_release, installed_transformers
from mrope.towers.frame_cache import _MEMORY, Piece

Int64Array = npt.NDArray[np.int64]


Int32Array = npt.NDArray[np.int32]


FloatArray = npt.NDArray[np.float32]


READ_SINCE: dict[str, tuple[int, int]] = {
    "cu_seqlens": (5, 9),
    "max_seqlen": (5, 15),
    "position_ids": (5, 9),
    "window_index": (5, 9),
    "cu_window_seqlens": (5, 9),
    "max_window_seqlen": (5, 15),
    "interp_indices": (5, 15),
    "interp_weights": (5, 15),
}
"""The transformers release (major, minor) whose towers are the first to read each key."""


@dataclass(frozen=True)
class VisionSpec:
    """The numbers of a vision tower: plain data, picklable, comparable.

    Attributes:
        spatial_merge_size: patches that are merged along each side of a token.
        window_side: merged tokens along each side of an attention window; None: no windows.
        table_side: learned positions along each side of the tower's table; None: no table.
        positions: the tower takes its patches' positions.
        videos: the tower takes videos.
        raster: see `mrope.spec.families.Tower`.
    """

    spatial_merge_size: int
    window_side: int | None = None
    table_side: int | None = None
    positions: bool = True
    videos: bool = True
    raster: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | str | os.PathLike[str] | Any) -> VisionSpec:
        """Read a spec from a model's config, or from its `vision_config` section.

        Args:
            config: a dict, the path of a `config.json` or of the folder that holds it, or a live
                `PretrainedConfig`. Its `model_type` may be the model's or the tower's.

        Raises:
            MRopeError: not a config, a `model_type` without a known tower, a key that is missing or
                of the wrong type, a window smaller than a merged token.

        Example:
            >>> VisionSpec.from_config({
            ...     "model_type": "qwen2_5_vl",
            ...     "vision_config": {
            ...         "spatial_merge_size": 2, "window_size": 112, "patch_size": 14,
            ...     },
            ... }).window_side
            4
        """
        name, table = model_section(as_mapping(config))
        tower = _tower(name)
        vision = table.get("vision_config", table)
        if not isinstance(vision, Mapping):
            raise MRopeError(f"{name}: vision_config must be a section, not {vision!r}")
        where = f"{name} vision_config"
        merge = read_int(vision, ("spatial_merge_size",), where, 1)
        return cls(
            spatial_merge_size=merge,
            window_side=_window_side(vision, where, merge) if tower.windows else None,
            table_side=_table_side(vision, where, tower) if tower.table else None,
            positions=tower.positions,
            videos=tower.videos,
            raster=tower.raster,
        )

    @property
    def keys(self) -> tuple[str, ...]:
        """Names under which the tower takes its tensors, without `image_` or `video_`."""
        keys: tuple[str, ...] = ("cu_seqlens", "max_seqlen")
        if self.positions:
            keys += ("position_ids",)
        if self.window_side is not None:
            keys += ("window_index", "cu_window_seqlens", "max_window_seqlen")
        if self.table_side is not None:
            keys += ("interp_indices", "interp_weights")
        return keys


def check_release(spec: VisionSpec, version: str | None = None) -> None:
    """Refuse a transformers whose towers would not read what `vision_tensors` computes.

    Args:
        version: release to check; None: the installed one. Without transformers there is nothing to
            check: the model runs elsewhere.

    Raises:
        MRopeError: the release is older than one of the spec's keys; the message lists them.

    Example:
        >>> check_release(VisionSpec(2, table_side=48), "5.23.0")
    """
    version = version if version is not None else installed_transformers()
    if version is None:
        return
    release = as_release(version)
    unread = [key for key in spec.keys if release < READ_SINCE[key]]
    if unread:
        major, minor = max(READ_SINCE[key] for key in unread)
        raise MRopeError(
            f"transformers {version} does not read the vision tensors {', '.join(unread)}; "
            f"install {major}.{minor} or later, or leave vision tensors out"
        )


def vision_tensors(
    spec: VisionSpec, grid_thw: npt.ArrayLike | None
) -> dict[str, npt.NDArray[Any] | int]:
    """Compute all that a vision tower takes beside its pixels, from the grids alone.

    Args:
        spec: the tower's numbers.
        grid_thw: (N, 3) integers: frames, height and width in patches of each image, or of each
            video, in the order of their pixels. None or no rows: there is nothing to compute, and
            the towers are not called either.

    Returns:
        The tensors under the tower's own names, `spec.keys`; empty where there are no grids. P is
        the sum of t * h * w, M is P / spatial_merge_size ** 2.

        - `cu_seqlens` int32 (frames + 1,), `max_seqlen` int: see `frame_borders`.
        - `position_ids` int64 (P, 2): see `patch_positions`.
        - `window_index` int64 (M,), `cu_window_seqlens` int32 (windows + 1,), `max_window_seqlen`
          int: see `window_order`; with `spec.window_side`.
        - `interp_indices` int64 (P, 4), `interp_weights` float32 (P, 4): see `table_taps`; with
          `spec.table_side`.

        The arrays are the caller's own and writable. Values, dtypes and shapes are those of
        `transformers.vision_utils` 5.23, weights too, bit for bit.

    Raises:
        MRopeError: grids of a wrong shape, dtype or size.

    Example:
        >>> tensors = vision_tensors(VisionSpec(spatial_merge_size=2), [[1, 2, 4]])
        >>> tensors["position_ids"].tolist()
        [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
        >>> tensors["cu_seqlens"].tolist(), tensors["max_seqlen"]
        ([0, 8], 8)
    """
    grid_N3 = _as_grids(grid_thw, spec.spatial_merge_size)
    if not len(grid_N3):
        return {}
    borders_F1 = frame_borders(grid_N3)
    tensors: dict[str, npt.NDArray[Any] | int] = {
        "cu_seqlens": borders_F1,
        "max_seqlen": _longest(borders_F1),
    }
    block = 1 if spec.raster else spec.spatial_merge_size
    if spec.positions:
        tensors["position_ids"] = patch_positions(grid_N3, block)
    if spec.window_side is not None:
        order_M, borders_W1 = window_order(grid_N3, spec.spatial_merge_size, spec.window_side)
        tensors["window_index"] = order_M
        tensors["cu_window_seqlens"] = borders_W1
        tensors["max_window_seqlen"] = _longest(borders_W1)
    if spec.table_side is not None:
        corners = not spec.raster
        indices_P4, weights_P4 = table_taps(grid_N3, block, spec.table_side, corners)
        tensors["interp_indices"] = indices_P4
        tensors["interp_weights"] = weights_P4
    return tensors


def frame_borders(grid_N3: Int64Array) -> Int32Array:
    """Return where each frame begins and ends among the patches, int32 (F + 1,).

    Every frame is an attention segment of its own: a clip (3, 2, 2) gives 0, 4, 8, 12.
    """
    return _borders((grid_N3[:, 1] * grid_N3[:, 2]).repeat(grid_N3[:, 0]))


def patch_positions(grid_N3: Int64Array, merge: int) -> Int64Array:
    """Return row and column of each patch within its frame, int64 (P, 2).

    Patches come in blocks of `merge` x `merge`: blocks row by row, and row by row within a block.
    """
    (positions_P2,) = _join(_positions, grid_N3, merge)
    return positions_P2


def block_index(grid_thw: npt.ArrayLike, merge: int) -> Int64Array:
    """Return the order that brings patches in raster order into blocks, int64 (P,).

    A frame of 2 x 4 patches, merged by 2: patches 0 1 4 5 are the first block, 2 3 6 7 the second.
    """
    grid_N3 = _as_grids(grid_thw, merge)
    size_F = (grid_N3[:, 1] * grid_N3[:, 2]).repeat(grid_N3[:, 0])
    row_P, column_P = patch_positions(grid_N3, merge).T
    width_P = grid_N3[:, 2].repeat(grid_N3[:, 0]).repeat(size_F)
    index_P: Int64Array = row_P * width_P + column_P + (size_F.cumsum() - size_F).repeat(size_F)
    return index_P


def window_order(grid_N3: Int64Array, merge: int, side: int) -> tuple[Int64Array, Int32Array]:
    """Return the order in which windows take the merged tokens, and the windows' borders.

    A frame is cut into windows of `side` x `side` merged tokens, smaller at its right and lower
    edge. Windows go row by row, and so do the tokens within one.

    Returns:
        Merged tokens in window order, int64 (M,), numbered over all grids; borders of the windows
        in patches, int32 (W + 1,).
    """
    order_M, lengths_W = _join(_windows, grid_N3, merge, side)
    tokens_F = (grid_N3[:, 1] * grid_N3[:, 2]).repeat(grid_N3[:, 0]) // merge**2
    order_M += (tokens_F.cumsum() - tokens_F).repeat(tokens_F)
    return order_M, _borders(lengths_W)


def table_taps(
    grid_N3: Int64Array, merge: int, side: int, corners: bool = True
) -> tuple[Int64Array, FloatArray]:
    """Return the four learned positions that each patch mixes, and their weights.

    The table of `side` x `side` positions is stretched bilinearly over a frame. With `corners` the
    centres of its corner positions meet those of the frame's corner patches, else its outer edges
    meet the frame's (torch's `align_corners`). Taps are upper left, upper right, lower left, lower
    right; patches are in the order of `patch_positions`.

    Returns:
        Indices into the flat table, int64 (P, 4), and weights, float32 (P, 4).
    """
    indices_P4, weights_P4 = _join(_taps, grid_N3, merge, side, corners)
    return indices_P4, weights_P4


def _window_side(vision: Mapping[str, Any], where: str, merge: int) -> int:
    window = read_int(vision, ("window_size",), where, 1)
    patch = read_int(vision, ("patch_size",), where, 1)
    side = window // merge // patch
    if side < 1:
        raise MRopeError(
            f"{where}: window_size={window} is smaller than a merged token of "
            f"{merge} x {patch} pixels"
        )
    return side


def _table_side(vision: Mapping[str, Any], where: str, tower: Tower) -> int:
    """Return the side of the table; one in raster order covers the image that was trained on."""
    if tower.raster:
        image, patch = (read_int(vision, (key,), where, 1) for key in ("image_size", "patch_size"))
        return image // patch
    return int(read_int(vision, ("num_position_embeddings",), where, 1) ** 0.5)


def _tower(name: object) -> Tower:
    """Return the tower of a `model_type`, which may be the model's or the tower's own."""
    plain = str(name).removesuffix("_encoder").removesuffix("_vision")
    families = {plain, f"{plain}_thinker"} & FAMILIES.keys()
    tower = FAMILIES[families.pop()].tower if families else ONE_DIMENSIONAL.get(plain)
    if tower is None:
        known = [name for name, row in FAMILIES.items() if row.tower is not None]
        known += [name for name, tower in ONE_DIMENSIONAL.items() if tower is not None]
        raise MRopeError(
            f"model_type {name!r} has no vision tower whose tensors mrope computes; "
            f"known: {', '.join(known)}"
        )
    return tower


def _as_grids(grid_thw: npt.ArrayLike | None, merge: int) -> Int64Array:
    grid_N3 = as_grid("grid_thw", grid_thw)
    wrong_N = (grid_N3 < 1).any(axis=1) | (grid_N3[:, 1:] % merge != 0).any(axis=1)
    if wrong_N.any():
        ordinal = int(wrong_N.argmax())
        raise MRopeError(
            f"grid_thw[{ordinal}] = {grid_N3[ordinal].tolist()}: sizes must be at least 1, height "
            f"and width multiples of spatial_merge_size={merge}; usual cause: a grid of another "
            "processor"
        )
    return grid_N3


def _join(build: Callable[..., Piece], grid_N3: Int64Array, *numbers: int) -> Piece:
    """Concatenate what `build(h, w, *numbers)` returns for each frame of each grid."""
    frames, heights, widths = grid_N3.T.tolist()
    sizes = list(zip(heights, widths, strict=True))
    pieces = {size: _MEMORY.recall(build, *size, *numbers) for size in set(sizes)}
    of_frames = chain.from_iterable(map(repeat, map(pieces.__getitem__, sizes), frames))
    return tuple(map(np.concatenate, zip(*of_frames, strict=True)))


def _borders(lengths: npt.NDArray[Any]) -> Int32Array:
    borders = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=borders[1:], dtype=np.int32)
    return borders


def _longest(borders: Int32Array) -> int:
    return int(np.diff(borders).max())


def _positions(height: int, width: int, merge: int) -> Piece:
    positions = np.empty((height // merge, width // merge, merge, merge, 2), np.int64)
    positions[..., 0] = np.arange(height).reshape(-1, 1, merge, 1)
    positions[..., 1] = np.arange(width).reshape(-1, 1, merge)
    return (positions.reshape(-1, 2),)


def _windows(height: int, width: int, merge: int, side: int) -> Piece:
    row_L = np.arange(height // merge) // side
    column_L = np.arange(width // merge) // side
    window = (row_L[:, None] * (column_L[-1] + 1) + column_L).ravel()
    # A stable sort keeps the tokens of each window row by row.
    return window.argsort(kind="stable"), np.bincount(window) * merge**2


def _taps(height: int, width: int, merge: int, side: int, corners: bool) -> Piece:
    rows, row_weights, _, _ = _MEMORY.recall(_axis_tables, height, merge, side, corners)
    _, _, columns, column_weights = _MEMORY.recall(_axis_tables, width, merge, side, corners)
    shape = (height // merge, width // merge, merge, merge * 4)
    indices, weights = np.empty(shape, np.int64), np.empty(shape, np.float32)
    np.add(_down(rows, merge), _along(columns, merge), out=indices)
    np.multiply(_down(row_weights, merge), _along(column_weights, merge), out=weights)
    return indices.reshape(-1, 4), weights.reshape(-1, 4)


def _down(values: npt.NDArray[Any], merge: int) -> npt.NDArray[Any]:
    return values.reshape(-1, 1, merge, values.shape[1])


def _along(values: npt.NDArray[Any], merge: int) -> npt.NDArray[Any]:
    return values.reshape(1, -1, 1, merge * values.shape[1])


def _axis_tables(length: int, merge: int, side: int, corners: bool) -> Piece:
    """Return an axis' taps and weights, laid out for a frame's rows and for its columns.

    As columns they are (L, 4): two taps, twice. As rows they are (L, merge * 4): each tap twice,
    and that for the `merge` patches of a block's row, so that numpy's innermost loop is as long as
    it can be. Rows are already multiplied by the table's width.

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
    """Return the two table rows that each of `length` positions falls between, and their weights.

    The order of operations, all in float32, is that of torch: another order, or float64, rounds
    differently. A tap beyond the table is moved to the edge and keeps its weight.
    """
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


# A worker that is forked while another thread holds the lock would wait for it forever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_MEMORY.lock.acquire,
        after_in_parent=_MEMORY.lock.release,
        after_in_child=_MEMORY.lock.release,
    )
