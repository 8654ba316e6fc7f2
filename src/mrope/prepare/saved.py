"""Find the states of samplers and streams in those of the loaders that keep them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mrope.columns import Columns
from mrope.errors import MRopeError

# How many batches ago a `StatefulDataLoader` of torchdata last took the states in it.
_LATE = "_steps_since_snapshot"


def find_states(saved: object, name: str, keys: set[str]) -> list[tuple[Columns, int]]:
    """Return the states of a kind, and by how many batches each is late.

    Args:
        saved: the state of an iterator, or of a `StatefulDataLoader` or a trainer around it.
        name: the class that made the state, for errors.
        keys: which a state has, and nothing around it.

    Raises:
        MRopeError: there is none.
    """
    found = list(_search(saved, keys, 0))
    if not found:
        lacks = next(
            key for key in sorted(keys) if not (isinstance(saved, Mapping) and key in saved)
        )
        raise MRopeError(f"not a state of {name}: it has no {lacks}")
    return found


def _search(saved: object, keys: set[str], late: int) -> Iterator[tuple[Columns, int]]:
    if isinstance(saved, Mapping):
        if keys <= saved.keys():
            yield saved, late
            return
        late = saved.get(_LATE, late)
        saved = list(saved.values())
    if isinstance(saved, Sequence) and not isinstance(saved, str | bytes):
        for each in saved:
            yield from _search(each, keys, late)
