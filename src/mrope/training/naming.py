"""Name the row of the dataset in whatever it makes a library raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mrope.errors import MRopeError


@contextmanager
def naming_row(index: int) -> Iterator[None]:
    """Raise every exception of a block as an `MRopeError` that names the row."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, MRopeError) else f"{type(error).__name__}: "
        raise MRopeError(f"row {index} of the dataset: {kind}{error}") from error
