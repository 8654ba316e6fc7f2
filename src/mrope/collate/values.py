"""Bring the value of a column into one form, however a dataset or a processor gave it.

Tensors, arrays, lists, Arrow scalars and pandas' nulls: what is absent is None, and what has a
value has all its axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from mrope.arrays import Array
from mrope.columns import COLUMNS, Column, Columns
from mrope.errors import MRopeError
from mrope.positions.inputs import refuse_half_precision, refuse_stacked_grids

# What numpy and torch hold numbers in.
_NUMBERS = (torch.Tensor, np.ndarray, np.generic)
# Columns whose numbers are counted with.
_COUNTED_BY = ("size", "seconds", "merge", "mask")


def read_value(name: str, column: Column | None, value: object) -> Any:
    """Return a column's value in its one form, or None where it is absent.

    Args:
        column: its line of the table; None: a column of the user, of which only nulls are absent.

    Raises:
        MRopeError: grids with a batch axis, a token column without an axis, numbers that
            `check_numbers` refuses.
    """
    if column is not None and hasattr(value, "__array__") and not isinstance(value, _NUMBERS):
        value = np.asarray(value)  # arrays of pyarrow, series of pandas
    value = plain(value)
    if column is None or column.kind == "batch" or value is None:
        return value
    if _is_empty(value):
        # A row without a token is a row; one whose ids are null is a fault.
        has_no_tokens = name == "input_ids" and not _holds_null(value)
        return _with_axes(name, column, value) if has_no_tokens else None
    if (column.integers or column.means == "seconds") and _is_nan_alone(value):
        return None
    if isinstance(value, (list, tuple)) and isinstance(value[0], (torch.Tensor, np.ndarray)):
        value = _joined(value, _axes_of_whole(column, value[0]))
    value = _with_axes(name, column, value)
    if isinstance(value, (torch.Tensor, np.ndarray)):
        check_numbers(name, value)
    return value


def check_numbers(name: str, value: torch.Tensor | Array) -> None:
    """Refuse an array that a column of tokens, sizes or seconds cannot hold; others pass.

    Raises:
        MRopeError: a tensor that is not dense or not in the CPU's memory; no integers, or integers
            beyond int64, where the column holds integers; seconds at half precision.
    """
    column = COLUMNS.get(name)
    if column is None or not (column.kind == "token" or column.means in _COUNTED_BY):
        return
    tensor = value if isinstance(value, torch.Tensor) else None
    if tensor is not None and not (tensor.is_cpu and tensor.layout == torch.strided):
        raise MRopeError(
            f"{name} is on {tensor.device}, {tensor.layout}: rows hold dense CPU tensors"
        )
    if column.means == "seconds":
        refuse_half_precision(name, value)
    elif tensor is None:
        _check_integers(name, column, cast("Array", value))
    elif not tensor.is_floating_point() and not tensor.is_complex():
        _check_integers(name, column, tensor.numpy())
    elif tensor.numel():
        raise MRopeError(f"{name} must hold integers, not {tensor.dtype}")


def _check_integers(name: str, column: Column, value: Array) -> None:
    # A mask may be bool, and so may types of tokens.
    sized = column.kind == "item" and column.means != "mask"
    if value.size and value.dtype.kind not in ("iu" if sized else "iub"):
        raise MRopeError(f"{name} must hold integers, not {value.dtype}")
    if value.dtype == np.uint64 and (value > np.iinfo(np.int64).max).any():
        raise MRopeError(f"{name} holds integers beyond int64")


def as_tensor(name: str, value: object) -> torch.Tensor:
    """Return a column as a tensor; Python floats become float32, as torch's default is.

    Raises:
        MRopeError: it is ragged, or holds something other than numbers, or numbers that
            `check_numbers` refuses.
    """
    if isinstance(value, torch.Tensor):
        return value
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MRopeError(
            f"{name} is ragged, or holds something other than numbers, and cannot become a "
            f"tensor: {error}"
        ) from error
    check_numbers(name, tensor)
    return tensor


def plain(value: Any) -> Any:
    """Return an entry of a column as None, a number, a string, or a writable array or list.

    Arrow and its readers give a null as NaN, a list of lists as an array of arrays, and an array as
    a read-only view; a table gives every entry as a `pyarrow.Scalar`, pandas a null as `NA`.
    """
    if isinstance(value, torch.Tensor):
        # A null of an array column is tensor(nan) under the torch format of `datasets`.
        return None if value.ndim == 0 and value.is_floating_point() and value.isnan() else value
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


def _of_array(array: Array) -> Any:
    if array.ndim == 0 and array.dtype.kind in "fO":
        item = plain(array.item())
        return item if item is None or array.dtype == np.object_ else array
    if array.dtype != np.object_:
        # torch takes neither another byte order nor steps backwards.
        if not array.dtype.isnative:
            return array.astype(array.dtype.newbyteorder("="))
        as_it_is = array.flags.writeable and min(array.strides, default=0) >= 0
        return array if as_it_is else array.copy()
    values = [_of_array(one) if isinstance(one, np.ndarray) else one for one in array.tolist()]
    if any(isinstance(one, torch.Tensor) or one is None for one in values):
        return values
    try:
        return np.array(values)
    except ValueError:  # lists of unequal length
        return [one.tolist() if isinstance(one, np.ndarray) else one for one in values]


def _is_empty(value: object) -> bool:
    """Whether a value holds no number: `[]`, `[[]]`, `[None]`, arrays and tensors of size 0."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 0
    if isinstance(value, np.ndarray):
        return value.size == 0
    if isinstance(value, (list, tuple)):
        # Ends at the first number, so that long lists cost nothing.
        return all(map(_is_empty, value))
    return value is None


def _holds_null(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_holds_null, value))
    return value is None


def _is_nan_alone(value: object) -> bool:
    """Whether a column holds NaN alone, as numpy and torch show a list of Arrow nulls."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind == "f" and bool(np.isnan(value).all())
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() and bool(value.isnan().all())
    return False


def _axes_of_whole(column: Column, part: Any) -> int:
    """Return the axes of a column that came as a list of parts."""
    if column.kind == "patch" and column.axes > 1:
        # (patches, dim) or (patches, channels, height, width): other parts are single patches.
        return int(part.ndim + part.ndim % 2)
    return column.axes


def _joined(parts: Sequence[Any], axes: int) -> Any:
    """Join tensors or arrays: one after another if they have all axes, else side by side."""
    whole = parts[0].ndim >= axes
    try:
        if any(isinstance(part, torch.Tensor) for part in parts):
            tensors = [torch.as_tensor(part) for part in parts]
            return torch.cat(tensors) if whole else torch.stack(tensors)
        return np.concatenate(parts) if whole else np.stack(parts)
    except (TypeError, ValueError, RuntimeError):
        return parts  # refused by whoever makes a tensor of it, with the row and the column


def joined_images(sample: Columns, name: str, sizes: Sequence[str]) -> Any:
    """Join pixels that came apart for each image or clip, as tables store them: (N, patches, dim).

    Their number and patches are those of the grids; other values of as many axes stay.
    """
    value = sample[name]
    if axes_of(value) not in (3, 5):
        return value
    size_N = next((sample[size] for size in sizes if size in sample), ())
    if [int(np.prod(np.asarray(size))) for size in size_N] != list(map(len, value)):
        return value
    parts = [one if isinstance(one, torch.Tensor) else np.asarray(one) for one in value]
    return _joined(parts, parts[0].ndim)


def _with_axes(name: str, column: Column, value: Any) -> Any:
    axes = axes_of(value)
    if column.kind == "token" and axes == 0:
        value = np.asarray(value)  # a range is a column, a number or a text is none
        if not value.ndim:
            raise MRopeError(f"{name} must be (n,) or (1, n), not ()")
        return value
    if column.kind == "token":
        return value[0] if axes == 2 and len(value) == 1 else value
    if column.means == "size" and column.sides == 3:
        refuse_stacked_grids(name, axes, value)
    if column.kind == "patch" or axes != column.axes - 1:
        return value
    if isinstance(value, torch.Tensor):
        return value[None]
    return np.asarray(value)[None] if isinstance(value, (np.ndarray, np.generic)) else [value]


def axes_of(value: object) -> int:
    """Return the number of axes of a tensor, an array or nested lists, by their first entries."""
    if isinstance(value, (list, tuple)):
        return 1 + (axes_of(value[0]) if value else 0)
    return int(getattr(value, "ndim", 0))
