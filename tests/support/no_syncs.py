"""Raise where a block syncs, by CUDA's own debug mode: scripts for a GPU do not trust the guard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mrope.guard import SyncGuard


@contextmanager
def no_syncs(device: torch.device) -> Iterator[None]:
    """Raise at a sync of the block: RuntimeError on CUDA, the guard's `HostSyncError` on a CPU."""
    if device.type != "cuda":
        with SyncGuard(mode="error"):
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
