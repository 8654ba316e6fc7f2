"""Read batches of columns as `datasets`, Ray and pyarrow give them, and add columns to them.

pyarrow is imported only when the caller passes a table.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt


def is_table(columns: Any) -> bool:
    """Return whether a batch of columns is a `pyarrow.Table`."""
    pyarrow = sys.modules.get("pyarrow")
    return pyarrow is not None and isinstance(columns, pyarrow.Table)


def columns_of(table: Any) -> dict[str, Any]:
    """Return the columns of a table by name; `plain` reads their entries."""
    return {name: table[name] for name in table.column_names}


def with_added(
    columns: Any, added: Mapping[str, npt.NDArray[np.int64]], lists: Collection[str]
) -> Any:
    """Return a batch of columns with `added`, which replaces columns of the same names.

    Args:
        columns: a mapping from names to columns, or a `pyarrow.Table`; it is not changed.
        added: int64 (rows,) for each name.
        lists: names of the columns that hold lists or nulls.
    """
    if is_table(columns):
        return _with_appended(columns, added)
    if type(columns) is dict:
        columns = {name: _writable(column, name in lists) for name, column in columns.items()}
    return columns | added


def _with_appended(table: Any, added: Mapping[str, npt.NDArray[np.int64]]) -> Any:
    import pyarrow as pa

    table = table.drop_columns([name for name in added if name in table.column_names])
    for name, column in added.items():
        # The type is stated since a batch without rows would leave it open.
        table = table.append_column(name, pa.array(column, pa.int64()))
    return table


def _writable(column: Any, lists: bool) -> Any:
    """Return a column in a form that `datasets` and Ray write as they read it.

    `datasets` gives arrays of arrays, and writes only lists of arrays. Ray gives NaN for a block of
    nulls, and refuses to join it, as numbers, with the blocks that hold lists.
    """
    if not isinstance(column, np.ndarray):
        return column
    if lists and column.ndim == 1 and column.dtype.kind == "f" and np.isnan(column).all():
        return [None] * len(column)
    return list(column) if column.dtype == np.object_ else column


def plain(value: Any) -> Any:
    """Return an entry of a column as None, a number, a string, or a writable array or list.

    Arrow and its readers give a null as NaN, a list of lists as an array of arrays, and an array as
    a read-only view; a table gives every entry as a `pyarrow.Scalar`.
    """
    if hasattr(value, "as_py"):
        value = _of_scalar(value)
    if isinstance(value, np.ndarray):
        return _of_array(value)
    is_number = isinstance(value, (float, np.floating))
    return None if is_number and math.isnan(value) else value


def _of_scalar(scalar: Any) -> Any:
    """Return what a scalar holds; a list of numbers as an array, not as a list of Python ints."""
    values = getattr(scalar, "values", None)
    if values is None or hasattr(values, "values"):  # a null or a number, or a list of lists
        return scalar.as_py()
    return values.to_numpy(zero_copy_only=False)


def _of_array(array: npt.NDArray[Any]) -> Any:
    if array.ndim == 0 and array.dtype.kind == "f" and np.isnan(array):
        return None
    if array.dtype != np.object_:
        return array if array.flags.writeable else array.copy()
    try:
        return np.array(array.tolist())
    except ValueError:  # lists of unequal length
        return array.tolist()
