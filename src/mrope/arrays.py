"""Array types, borders of groups, and conversion of array arguments with errors that name them."""

from __future__ import annotations

import operator
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from mrope.errors import MRopeError

Array = npt.NDArray[Any]
IntArray = npt.NDArray[np.integer[Any]]
BoolArray = npt.NDArray[np.bool_]


def starts(lengths: IntArray) -> IntArray:
    """Return where each group starts: lengths 3 2 4 give 0 3 5."""
    before: IntArray = lengths.cumsum() - lengths
    return before


def borders(lengths: IntArray, dtype: npt.DTypeLike = np.int64) -> Array:
    """Return 0 and the running sums: lengths 3 2 give 0 3 5."""
    out: Array = np.zeros(len(lengths) + 1, dtype)
    np.add.accumulate(lengths, out=out[1:], dtype=dtype)
    return out


def within(lengths: IntArray) -> IntArray:
    """Return the index within each group: lengths 3 0 2 give 0 1 2 0 1."""
    place: IntArray = np.arange(lengths.sum()) - starts(lengths).repeat(lengths)
    return place


def run_borders(values_T: Array, cuts: IntArray | None = None) -> IntArray:
    """Cut an array where its value changes, and at `cuts`; return the borders, 0 and T included.

    values 0 0 1 1 1 0 with a cut at 4 give 0 2 4 5 6: runs of 2 2 1 1.
    """
    tokens = len(values_T)
    border = np.empty(tokens + 1, np.bool_)
    np.not_equal(values_T[1:], values_T[:-1], out=border[1:tokens])
    border[0] = border[tokens] = True
    if cuts is not None:
        border[cuts] = True
    return border.nonzero()[0]


def as_array(name: str, values: npt.ArrayLike, hint: str) -> Array:
    """Convert `values` to an array.

    Args:
        name: argument's name in errors.
        values: array or nested lists.
        hint: what the argument holds, for errors.

    Raises:
        MRopeError: nested lists of unequal length.
    """
    if type(values) is np.ndarray:
        return values
    try:
        return np.asarray(values)
    except ValueError as error:
        raise MRopeError(f"{name} is ragged: {hint}") from error


def as_integers(name: str, values: npt.ArrayLike, hint: str) -> IntArray:
    """Convert `values` to an array of integers; arguments as in `as_array`.

    Raises:
        MRopeError: ragged lists, floats or other types, or integers beyond int64.
    """
    array = values if type(values) is np.ndarray else as_array(name, values, hint)
    kind = array.dtype.kind
    if kind == "i":
        return array
    if kind == "u":
        # numpy promotes uint64 with int64 to float64.
        if array.itemsize == 8 and (array > np.iinfo(np.int64).max).any():
            raise MRopeError(f"{name} holds integers beyond int64: {hint}")
        return array.astype(np.int64) if array.itemsize == 8 else array
    if array.size:
        raise MRopeError(f"{name} must hold integers, not {array.dtype}: {hint}")
    return array.astype(np.int64)


def as_whole(name: str, value: Any, lowest: int) -> int:
    """Return `value` as an int; numpy's integers pass, floats such as 2.0 do not.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is below `lowest`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, not {type(value).__name__}") from None
    if number < lowest:
        raise ValueError(f"{name} must be at least {lowest}, not {number}")
    return number


_INT64 = np.dtype(np.int64)
_NO_GRID = np.empty((0, 3), np.int64)


def as_grid(name: str, grid_thw: npt.ArrayLike | None) -> npt.NDArray[np.int64]:
    """Convert grids to int64 (N, 3), with N = 0 for None; sizes are not checked.

    Raises:
        MRopeError: not integers, or another shape.
    """
    if grid_thw is None:
        return _NO_GRID
    array = as_integers(name, grid_thw, "frames, height and width in patches")
    if array.ndim != 2 or array.shape[1] != 3:
        if array.shape == (0,):
            return _NO_GRID
        raise MRopeError(f"{name} must have shape (N, 3), not {array.shape}")
    if array.dtype != _INT64:
        return array.astype(np.int64)
    # Not `astype(copy=False)`: on a short batch a call of numpy costs as much as its arithmetic.
    return cast("npt.NDArray[np.int64]", array)
