"""Normalise one sample: leave out absent columns, and give single sizes their missing axis.

`PaddingCollator`, `mrope.prepare.Precheck` and `mrope check` all read samples here, so that a
sample that is good in one of them is good in all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mrope.positions.inputs import length_error, refuse_stacked_grids

TOKENS = (
    "input_ids",
    "attention_mask",
    "labels",
    "mm_token_type_ids",
    "moe_mm_token_type_ids",
    "token_type_ids",
)
GRIDS = ("image_grid_thw", "video_grid_thw")
CROPS = ("target_sizes", "target_sizes_videos")
SECONDS = ("second_per_grid_ts", "video_second_per_grid")
PIXELS = ("pixel_values", "pixel_values_videos")
FLAGS = ("use_audio_in_video", "downsample_mode")

# Axes of a sample's column; a value with one axis less is the only image, clip or audio.
_AXES = {
    **dict.fromkeys((*GRIDS, *CROPS, "feature_attention_mask"), 2),
    **dict.fromkeys((*SECONDS, "audio_seqlens", "seq_lengths"), 1),
    "input_features": 3,
}
KNOWN = frozenset((*TOKENS, *PIXELS, *FLAGS, *_AXES))
"""Columns that are read here; others belong to the user and stay as they are."""


def read_sample(example: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sample without its absent columns, and the others in one form.

    Absent is what holds no number: None, NaN and other nulls, and tensors, arrays and nested lists
    that are empty or hold nothing but nulls. Only `input_ids` may be empty: a row without a token.

    Returns:
        Token columns (n,); grids (N, 3), crops (N, 2), seconds and audio lengths (N,), each also
        where the sample has a single one without its axis; pixels as one tensor or array. Tensors
        stay tensors and numeric lists stay lists, so that dtypes are chosen where they are used.
        Columns outside of `KNOWN` are returned as they are.

    Raises:
        MRopeError: grids with a batch axis, or a token column of another length than `input_ids`.

    Example:
        >>> read_sample({"input_ids": [[7, 8]], "image_grid_thw": [1, 4, 4], "labels": []})
        {'input_ids': [7, 8], 'image_grid_thw': [[1, 4, 4]]}
    """
    columns = {
        name: read_column(name, value) if name in KNOWN else value
        for name, value in example.items()
    }
    sample = {
        name: value for name, value in columns.items() if value is not None or name not in KNOWN
    }
    _check_lengths(sample)
    return sample


def read_column(name: str, value: Any) -> Any:
    """Return one column as `read_sample` does, or None where it is absent.

    Of a column outside of `KNOWN` only nulls are.
    """
    value = plain(value)
    if name in FLAGS or name not in KNOWN or value is None:
        return value
    if _is_empty(value):
        # A row without a token is a row; one whose ids are null is a fault.
        has_no_tokens = name == "input_ids" and not _holds_null(value)
        return _with_axes(name, value) if has_no_tokens else None
    if isinstance(value, np.ndarray) and _is_null_integers(name, value):
        return None
    if isinstance(value, (list, tuple)) and isinstance(value[0], (torch.Tensor, np.ndarray)):
        value = _joined(value, _axes_of_whole(name, value[0]))
    return _with_axes(name, value)


def plain(value: Any) -> Any:
    """Return an entry of a column as None, a number, a string, or a writable array or list.

    Arrow and its readers give a null as NaN, a list of lists as an array of arrays, and an array as
    a read-only view; a table gives every entry as a `pyarrow.Scalar`, pandas a null as `NA`.
    """
    if isinstance(value, torch.Tensor):
        return value
    if hasattr(value, "as_py"):
        value = _of_scalar(value)
    if isinstance(value, np.ndarray):
        return _of_array(value)
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    is_number = isinstance(value, (float, np.floating))
    return None if is_number and math.isnan(value) else value


def _of_scalar(scalar: Any) -> Any:
    """Return what a scalar holds; a list of numbers as an array, not as a list of Python ints."""
    values = getattr(scalar, "values", None)
    if values is None or hasattr(values, "values"):  # a null or a number, or a list of lists
        return scalar.as_py()
    return values.to_numpy(zero_copy_only=False)


def _of_array(array: npt.NDArray[Any]) -> Any:
    if array.ndim == 0 and array.dtype.kind in "fO":
        return None if plain(array.item()) is None else array
    if array.dtype != np.object_:
        return array if array.flags.writeable else array.copy()
    values = [_of_array(one) if isinstance(one, np.ndarray) else one for one in array.tolist()]
    if any(isinstance(one, torch.Tensor) or one is None for one in values):
        return values
    try:
        return np.array(values)
    except ValueError:  # lists of unequal length
        return [one.tolist() if isinstance(one, np.ndarray) else one for one in values]


def _is_empty(value: Any) -> bool:
    """Whether a value holds no number: `[]`, `[[]]`, `[None]`, arrays and tensors of size 0."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 0
    if isinstance(value, np.ndarray):
        return value.size == 0
    if isinstance(value, (list, tuple)):
        # Ends at the first number, so that long lists cost nothing.
        return all(map(_is_empty, value))
    return value is None


def _holds_null(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_holds_null, value))
    return value is None


def _is_null_integers(name: str, array: npt.NDArray[Any]) -> bool:
    """Whether an integer column holds NaN alone, as numpy shows a list of Arrow nulls."""
    integers = name in (*TOKENS, *GRIDS, *CROPS, "audio_seqlens")
    return integers and array.dtype.kind == "f" and bool(np.isnan(array).all())


def _axes_of_whole(name: str, part: Any) -> int:
    """Return the axes of a column that came as a list of parts."""
    if name in PIXELS:
        # (patches, dim) or (patches, channels, height, width): other parts are single patches.
        return int(part.ndim + part.ndim % 2)
    return 1 if name in TOKENS else _AXES[name]


def _joined(parts: Any, axes: int) -> Any:
    """Join tensors or arrays: one after another if they have all axes, else side by side."""
    whole = parts[0].ndim >= axes
    try:
        if any(isinstance(part, torch.Tensor) for part in parts):
            tensors = [torch.as_tensor(part) for part in parts]
            return torch.cat(tensors) if whole else torch.stack(tensors)
        return np.concatenate(parts) if whole else np.stack(parts)
    except (TypeError, ValueError, RuntimeError):
        return parts  # refused by whoever makes a tensor of it, with the row and the column


def _with_axes(name: str, value: Any) -> Any:
    axes = axes_of(value)
    if name in TOKENS:
        return value[0] if axes == 2 and len(value) == 1 else value
    if name in GRIDS:
        refuse_stacked_grids(name, axes, value)
    if axes != _AXES.get(name, 0) - 1:
        return value
    if isinstance(value, torch.Tensor):
        return value[None]
    return np.asarray(value)[None] if isinstance(value, (np.ndarray, np.generic)) else [value]


def axes_of(value: Any) -> int:
    """Return the number of axes of a tensor, an array or nested lists, by their first entries."""
    if isinstance(value, (list, tuple)):
        return 1 + (axes_of(value[0]) if value else 0)
    return int(getattr(value, "ndim", 0))


def _check_lengths(sample: Mapping[str, Any]) -> None:
    """Refuse token columns of another length than `input_ids`.

    Raises:
        MRopeError: with both lengths and the usual cause.
    """
    ids = sample.get("input_ids")
    if ids is None or axes_of(ids) != 1:
        return
    for name in TOKENS:
        column = sample.get(name)
        if column is not None and axes_of(column) == 1 and len(column) != len(ids):
            # As of a batch of one, so that the text is that of `rope_index`.
            raise length_error(name, (1, len(column)), (1, len(ids)))
