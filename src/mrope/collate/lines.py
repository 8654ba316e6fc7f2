"""Whole lines in a file that many processes write to, and some of them die over."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def append_line(file: Path, record: dict[str, Any]) -> None:
    """Add a line by one write, under a lock.

    The kernel may stop a killed process within a write that crosses a page; so whoever writes next
    removes what stands behind the last line's end.
    """
    line = json.dumps(record, default=str).encode() + b"\n"
    with locked(file) as handle:
        _drop_torn_line(handle)
        if os.write(handle, line) != len(line):
            raise OSError(f"{file}: no room for a line of {len(line)} bytes")


@contextmanager
def locked(file: Path) -> Iterator[int]:
    """Open for appending; the lock ends with the handle, and so with the process at the latest."""
    import fcntl  # POSIX alone has it, and this package is imported elsewhere too

    handle = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def _drop_torn_line(handle: int) -> None:
    size = os.fstat(handle).st_size
    if not size or os.pread(handle, 1, size - 1) == b"\n":
        return
    start = max(0, size - (1 << 16))
    os.ftruncate(handle, start + os.pread(handle, size - start, start).rfind(b"\n") + 1)
