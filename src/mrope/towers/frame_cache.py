"""Per-process cache of what frames of one size contribute to a batch, bounded in bytes."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection

from mrope.arrays import Array

Piece = tuple[Array, ...]

CACHE_BYTES = 64 * 2**20
"""Maximum bytes of the per-process frame cache."""


def clear_cache() -> None:
    """Empty the frame cache, for example to time the first batch. Results do not change."""
    FRAME_CACHE.clear()


class FrameCache:
    """Least-recently-used cache of read-only arrays by the call that computes them.

    Thread-safe; two threads that miss the same call both compute it, and one result is kept.

    Attributes:
        limit: maximum bytes; a result above it is not cached.
        used: bytes held now, arrays and bookkeeping.
        lock: guards every access; held by the fork handlers too.
    """

    # Key, array objects and links of an entry: without them many tiny frames would be unbounded.
    _ENTRY_BYTES = 1024

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.lock = threading.Lock()
        self._pieces: OrderedDict[tuple[object, ...], Piece] = OrderedDict()

    def recall(self, build: Callable[..., Piece], *options: int) -> Piece:
        """Return `build(*options)` as read-only arrays, from the cache if it is there."""
        key = (build, *options)
        with self.lock:
            piece = self._pieces.get(key)
            if piece is not None:
                self._pieces.move_to_end(key)
                return piece
        # Built without the lock, so that one large frame does not block other threads.
        piece = build(*options)
        for array in piece:
            array.flags.writeable = False
        self._keep(key, piece)
        return piece

    def recall_all(
        self, build: Callable[..., Piece], sizes: Collection[tuple[int, ...]], *options: int
    ) -> dict[tuple[int, ...], Piece]:
        """Return `recall(build, *size, *options)` for each size, taking the lock once."""
        pieces: dict[tuple[int, ...], Piece] = {}
        with self.lock:
            for size in sizes:
                key = (build, *size, *options)
                piece = self._pieces.get(key)
                if piece is not None:
                    self._pieces.move_to_end(key)
                    pieces[size] = piece
        if len(pieces) < len(sizes):
            for size in set(sizes).difference(pieces):
                pieces[size] = self.recall(build, *size, *options)
        return pieces

    def clear(self) -> None:
        """Drop every entry."""
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


FRAME_CACHE = FrameCache(CACHE_BYTES)

# A child forked while another thread holds the lock would deadlock on its first use of the cache.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=FRAME_CACHE.lock.acquire,
        after_in_parent=FRAME_CACHE.lock.release,
        after_in_child=FRAME_CACHE.lock.release,
    )
