"""Cache of the tensors of frame sizes, one for each process, bounded in bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy.typing as npt

Piece = tuple[npt.NDArray[Any], ...]


CACHE_BYTES = 64 * 2**20
"""What one process remembers of the frames it met, at most; see `clear_cache`."""


def clear_cache() -> None:
    """Forget every frame, for example to measure without it. Results do not depend on it."""
    _MEMORY.clear()


class _Memory:
    """Read-only arrays by the call that makes them: those used last, up to a number of bytes.

    Threads may share it; two that miss the same call both make it, and one result is kept.

    Attributes:
        limit: bytes kept at most; a result above it is not kept at all.
        used: bytes kept now.
    """

    # Keys, array objects and links of an entry, so that many tiny frames are bounded too.
    _ENTRY_BYTES = 1024

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.lock = threading.Lock()
        self._pieces: OrderedDict[tuple[object, ...], Piece] = OrderedDict()

    def recall(self, build: Callable[..., Piece], *numbers: int) -> Piece:
        """Return `build(*numbers)`, from memory where it is there."""
        key = (build, *numbers)
        with self.lock:
            piece = self._pieces.get(key)
            if piece is not None:
                self._pieces.move_to_end(key)
                return piece
        piece = build(*numbers)
        for array in piece:
            array.flags.writeable = False
        self._keep(key, piece)
        return piece

    def clear(self) -> None:
        with self.lock:
            self._pieces.clear()
            self.used = 0

    def _keep(self, key: tuple[object, ...], piece: Piece) -> None:
        size = self._size(piece)
        with self.lock:
            if key in self._pieces or size > self.limit:
                return
            self._pieces[key] = piece
            self.used += size
            while self.used > self.limit:
                _, oldest = self._pieces.popitem(last=False)
                self.used -= self._size(oldest)

    def _size(self, piece: Piece) -> int:
        return self._ENTRY_BYTES + sum(array.nbytes for array in piece)


_MEMORY = _Memory(CACHE_BYTES)
