"""What columns are after their way through Arrow, undone; and Arrow's own tables.

pyarrow is not imported before somebody hands over a table: who does has it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mrope.positions.stored import LENGTH, SPANS, STAMP


def is_table(columns: Any) -> bool:
    """Whether a batch of columns is a `pyarrow.Table`."""
    pyarrow = sys.modules.get("pyarrow")
    return pyarrow is not None and isinstance(columns, pyarrow.Table)


def columns_of(table: Any) -> dict[str, Any]:
    """Return the columns of a table, whose entries `plain` takes."""
    return {name: table[name] for name in table.column_names}


def with_added(columns: Any, added: Mapping[str, Any], lists: Collection[str]) -> Any:
    """Return a batch of columns with the stored ones, in place of those that it has already.

    Args:
        lists: names of columns that hold lists or nulls, and no numbers.
    """
    if is_table(columns):
        return _with_appended(columns, added)
    if type(columns) is dict:
        columns = {name: _writable(column, name in lists) for name, column in columns.items()}
    return columns | added


def _with_appended(table: Any, added: Mapping[str, Any]) -> Any:
    import pyarrow as pa

    types = {SPANS: pa.list_(pa.int64()), LENGTH: pa.int64(), STAMP: pa.string()}
    table = table.drop_columns([name for name in added if name in table.column_names])
    for name, column in added.items():
        table = table.append_column(name, pa.array(column, types[name]))
    return table


def _writable(column: Any, lists: bool) -> Any:
    """Return a column so that it is written as it was read.

    `datasets` writes lists of arrays, but no arrays of arrays, which it may have given. Ray gives
    NaN for the nulls of a block that has nothing else, and takes a block with numbers for another
    table.
    """
    if not isinstance(column, np.ndarray):
        return column
    if lists and column.ndim == 1 and column.dtype.kind == "f":
        return [None] * len(column)
    return list(column) if column.dtype == np.object_ else column


def plain(value: Any) -> Any:
    """Return an entry of a column as it was before Arrow had it: None, or what it holds.

    A null may come as NaN, a list of lists as an array of arrays, an array as a read-only view, and
    from a table everything as a scalar of Arrow's.
    """
    if hasattr(value, "as_py"):
        value = _of_scalar(value)
    if isinstance(value, np.ndarray):
        return _of_array(value)
    is_number = isinstance(value, (float, np.floating))
    return None if is_number and math.isnan(value) else value


def _of_scalar(scalar: Any) -> Any:
    """Return what a scalar holds: lists of numbers as arrays, without a Python object for each."""
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
