"""Take batches of columns as `datasets`, Ray and pyarrow give them, and add columns to them.

pyarrow is imported only when the caller passes a table.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mrope.collate.values import plain
from mrope.columns import NewColumns


def is_frame(columns: object) -> bool:
    """Return whether a batch of columns is a `pyarrow.Table` or a `pandas.DataFrame`."""
    return _is_a(columns, "pyarrow", "Table") or _is_a(columns, "pandas", "DataFrame")


def _is_a(columns: object, package: str, kind: str) -> bool:
    # Without importing it: what was made by a package means that it is loaded.
    module = sys.modules.get(package)
    return module is not None and isinstance(columns, getattr(module, kind))


def columns_of(frame: Any) -> NewColumns:
    """Return the columns of a table or a frame by name; their entries are read by place."""
    if _is_a(frame, "pyarrow", "Table"):
        return {name: frame[name] for name in frame.column_names}
    # A series is indexed by its labels, which need not be places.
    return {name: frame[name].to_numpy() for name in frame.columns}


def pixels_of(columns: Any, names: Collection[str]) -> NewColumns:
    """Return columns of pixels as they are stored; `pixel_shape` reads their entries.

    A batch of `datasets` decodes a column when it is read, which takes longer than all the rest.
    """
    if _is_a(columns, "pandas", "DataFrame"):
        columns = columns_of(columns)
    table = columns if is_frame(columns) else getattr(columns, "pa_table", None)
    source, known = (columns, columns) if table is None else (table, table.column_names)
    return {name: source[name] for name in names if name in known}


def pixel_shape(value: Any) -> Any:
    """Return a row's pixels, or for an Arrow list zeros of as many patches and axes."""
    if not hasattr(value, "as_py"):
        return value
    value = getattr(value, "value", value)  # arrays of `datasets` are an extension of lists
    if value is None or not value.is_valid or value.values.null_count == len(value):
        return None
    axes, kind = 1, value.type.value_type
    while hasattr(kind, "value_type"):
        axes, kind = axes + 1, kind.value_type
    return np.zeros((len(value), *[1] * (axes - 1)))


def with_added(
    columns: Any, added: Mapping[str, npt.NDArray[np.int64]], lists: Collection[str]
) -> Any:
    """Return a batch of columns with `added`, which replaces columns of the same names.

    Args:
        columns: a mapping from names to columns, a `pyarrow.Table` or a `pandas.DataFrame`; it is
            not changed.
        added: int64 (rows,) for each name.
        lists: names of the columns that hold lists or nulls.
    """
    if _is_a(columns, "pyarrow", "Table"):
        return _with_appended(columns, added)
    if _is_a(columns, "pandas", "DataFrame"):
        return columns.assign(**added)
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


def _writable(column: object, lists: bool) -> Any:
    """Return a column in a form that `datasets` and Ray write as they read it.

    `datasets` gives arrays of arrays, and writes only lists of arrays. Ray gives NaN for a block of
    nulls, and refuses to join it, as numbers, with the blocks that hold lists.
    """
    if not isinstance(column, np.ndarray):
        return column
    if lists and column.ndim == 1 and column.dtype.kind == "f" and np.isnan(column).all():
        return [None] * len(column)
    if column.dtype != np.object_:
        return column
    if any(isinstance(one, np.ndarray) and not one.size for one in column):
        # Beside lists of lists, `datasets` writes an empty array as a column of nulls.
        entries = [plain(one) for one in column]
        return [one.tolist() if isinstance(one, np.ndarray) else one for one in entries]
    return list(column)
