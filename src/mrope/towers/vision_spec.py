"""Read a `VisionSpec` from a model's config: every value that vision tensors depend on."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

from mrope.columns import Columns
from mrope.errors import MRopeError
from mrope.spec.families import FAMILIES, ONE_DIMENSIONAL, Tower, find_family
from mrope.spec.model_config import read_int, read_model, read_tower
from mrope.spec.references import (
    TOWERS_READ_SINCE,
    as_release,
    installed_transformers,
    interpolates_to_corners,
)
from mrope.towers.vision import PRODUCTS, products_of

# Names of one value in the configs of different families.
_CHANNELS = ("in_channels", "in_chans", "num_channels")


@dataclass(frozen=True)
class VisionSpec:
    """Values of a vision tower that its tensors depend on: plain data, picklable, comparable.

    Attributes:
        spatial_merge_size: patches along each side that are merged into one token.
        window_side: merged tokens along each side of an attention window; None: no windows.
        table_side: learned positions along each side of the tower's table; None: no table.
        patch_shape: shape of a patch in `pixel_values`; None: the config does not say.
        tower: the family's row; by default, every tensor whose value above is given.
        convolution_side: weights along each side of the tower's convolutions over frames; None:
            there are none.
    """

    spatial_merge_size: int
    window_side: int | None = None
    table_side: int | None = None
    patch_shape: tuple[int, ...] | None = None
    tower: Tower = field(default_factory=Tower)
    convolution_side: int | None = None

    @classmethod
    def from_config(cls, config: Columns | str | os.PathLike[str] | Any) -> VisionSpec:
        """Read a spec from a model's config, or from its `vision_config` section.

        Args:
            config: a dict, the path of a `config.json` or of the folder that holds it, or a live
                `PretrainedConfig`. `model_type` may be the model's or the tower's.

        Raises:
            MRopeError: not a config, a `model_type` without a known tower, a key that is missing or
                of the wrong type, an attention window smaller than a merged token.

        Example:
            >>> VisionSpec.from_config({
            ...     "model_type": "qwen2_5_vl",
            ...     "vision_config": {
            ...         "spatial_merge_size": 2, "window_size": 112, "patch_size": 14,
            ...     },
            ... }).window_side
            4
        """
        name, table = read_model(config)
        family, tower = _find_tower(name)
        vision, where = read_tower(table, "vision_config", name, family)
        merge = _read_merge(vision, where, tower, table)
        tensors = (*tower.tensors, *(tower.fixed or ()))
        reads = {PRODUCTS[tensor].needs for tensor in tensors}
        convolves = "convolution_side" in reads
        return cls(
            merge,
            _read_window_side(vision, where, merge) if "window_side" in reads else None,
            _read_table_side(vision, where, tower) if "table_side" in reads else None,
            _read_patch_shape(vision, where, tower),
            tower,
            read_int(vision, ("conv_kernel_size",), where, 1) if convolves else None,
        )

    @property
    def with_fixed_shapes(self) -> VisionSpec:
        """The values of the same tower for batches of fixed shapes, see `Tower.fixed`."""
        fixed = self.tower.fixed
        return self if fixed is None else replace(self, tower=replace(self.tower, tensors=fixed))

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the tower's own tensors, without the prefix `image_` or `video_`.

        Example:
            >>> VisionSpec(2, table_side=48).keys
            ('cu_seqlens', 'max_seqlen', 'position_ids', 'interp_indices', 'interp_weights')
        """
        return tuple(key for one in products_of(self) if one.own for key in one.keys)


def check_release(spec: VisionSpec, version: str | None = None) -> None:
    """Refuse a transformers release whose towers take none of `vision_tensors`.

    Args:
        spec: the tower's values.
        version: release to check; None: the installed one. If none is installed, nothing is
            checked, since the model runs elsewhere.

    Raises:
        MRopeError: the release is too old.

    Example:
        >>> check_release(VisionSpec(2, table_side=48), "5.23.0")
    """
    version = version if version is not None else installed_transformers()
    if version is None:
        return
    if as_release(version) < TOWERS_READ_SINCE:
        major, minor = TOWERS_READ_SINCE
        raise MRopeError(
            f"transformers {version} does not read the vision tensors {', '.join(spec.keys)}; "
            f"install {major}.{minor} or later, or leave vision tensors out"
        )


def _read_merge(vision: Columns, where: str, tower: Tower, table: Columns) -> int:
    if tower.sizes == "crops":
        return 2 if table.get("downsample_mode") == "4x" else 4
    if tower.sizes == "merged_in_batch":
        return 1
    return read_int(vision, ("spatial_merge_size",), where, 1)


def _read_window_side(vision: Columns, where: str, merge: int) -> int:
    window = read_int(vision, ("window_size",), where, 1)
    patch = read_int(vision, ("patch_size",), where, 1)
    side = window // merge // patch
    if side < 1:
        raise MRopeError(
            f"{where}: window_size={window} is smaller than a merged token of "
            f"{merge} x {patch} pixels"
        )
    return side


def _read_patch_shape(vision: Columns, where: str, tower: Tower) -> tuple[int, ...] | None:
    """Return (channels * frames * side * side,), or (channels, side, side)."""
    if vision.get("patch_size") is None:
        return None
    side = read_int(vision, ("patch_size",), where, 1)
    channels = next((vision[key] for key in _CHANNELS if vision.get(key) is not None), 3)
    if tower.patch == "image":
        return (int(channels), side, side)
    # The patches of ERNIE and Cosmos3-Edge, whose classes have no such key, hold one frame.
    frames = vision.get("temporal_patch_size") or 1
    return (int(channels) * int(frames) * side * side,)


def _read_table_side(vision: Columns, where: str, tower: Tower) -> int:
    """Return the side of the table of learned positions.

    A table in raster order has one entry per patch of the training image size.
    """
    if not {"raster_table", "raster_table_to_corners", "nearest"}.isdisjoint(tower.tensors):
        image, patch = (read_int(vision, (key,), where, 1) for key in ("image_size", "patch_size"))
        return image // patch
    # A square table: the config holds the number of its entries.
    return int(read_int(vision, ("num_position_embeddings",), where, 1) ** 0.5)


def _find_tower(name: object) -> tuple[str, Tower]:
    """Return family and row of a tower by `model_type`, the model's or the tower's own."""
    # A tower's own `model_type` may have a suffix, "_vision" or "_vision_encoder".
    plain = str(name).removesuffix("_encoder").removesuffix("_vision")
    family = next((one for one in (plain, f"{plain}_thinker") if one in FAMILIES), plain)
    row = find_family(family)
    tower = None if row is None else row.tower
    if tower is None:
        rows = {**FAMILIES, **ONE_DIMENSIONAL}
        known = [name for name, row in rows.items() if row.tower is not None]
        raise MRopeError(
            f"model_type {name!r} has no vision tower whose tensors mrope computes; "
            f"known: {', '.join(known)}"
        )
    if interpolates_to_corners(family):
        names = {"raster_table": "raster_table_to_corners"}
        tower = replace(tower, tensors=tuple(names.get(one, one) for one in tower.tensors))
    return family, tower
