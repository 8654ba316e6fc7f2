"""Per-process cache of what frames of one size contribute to a batch, bounded in bytes.

Shape suffixes: N grids, F frames of all grids.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from mrope.arrays import Array

Piece = tuple[Array, ...]
Int64Array = npt.NDArray[np.int64]

CACHE_BYTES = 64 * 2**20
"""Maximum bytes of the per-process frame cache."""


# From so many bytes on numpy asks for huge pages, without which a large array takes longer to fill.
_HUGE = 4 * 2**20


class Frames(NamedTuple):
    """The frames of all grids of a batch.

    Attributes:
        grid_N3: the grids: frames, height and width in patches.
        size_F: height and width of each frame, as Python ints, which hash faster than numpy's.
        distinct: each size once.
        patches_F: patches of each frame.
    """

    grid_N3: Int64Array
    size_F: Sequence[tuple[int, int]]
    distinct: set[tuple[int, int]]
    patches_F: Int64Array

    @property
    def width_F(self) -> Int64Array:
        """Width of each frame."""
        return self.grid_N3[:, 2].repeat(self.grid_N3[:, 0])


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

    def join(self, build: Callable[..., Piece], frames: Frames, *options: int) -> Piece:
        """Concatenate `build(h, w, *options)` over all frames, each size computed once.

        Returns:
            Writable arrays, never shared with the cache.
        """
        pieces: dict[tuple[int, int], Piece] = {}
        with self.lock:
            for size in frames.distinct:
                key = (build, *size, *options)
                piece = self._pieces.get(key)
                if piece is not None:
                    self._pieces.move_to_end(key)
                    pieces[size] = piece
        if len(pieces) < len(frames.distinct):
            for size in frames.distinct - pieces.keys():
                pieces[size] = self.recall(build, *size, *options)
        return tuple(map(_concatenated, zip(*map(pieces.__getitem__, frames.size_F), strict=True)))

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


def _concatenated(parts: Sequence[Array]) -> Array:
    """Concatenate arrays of one dtype on their first axis: `np.concatenate`, for many small ones.

    That takes several times as long for each part as joining its bytes does.
    """
    first = parts[0]
    if first.nbytes * len(parts) > _HUGE:
        return np.concatenate(parts)
    # Arrays are buffers, which numpy's annotations say from Python 3.12 on.
    buffers = cast("Sequence[memoryview]", parts)
    joined: Array = np.frombuffer(bytearray().join(buffers), first.dtype)
    return joined.reshape(-1, *first.shape[1:])


FRAME_CACHE = FrameCache(CACHE_BYTES)

# A child forked while another thread holds the lock would deadlock on its first use of the cache.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=FRAME_CACHE.lock.acquire,
        after_in_parent=FRAME_CACHE.lock.release,
        after_in_child=FRAME_CACHE.lock.release,
    )
