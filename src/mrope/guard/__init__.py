"""Find what makes the host sync with a CUDA device, on a machine without one."""

from mrope.guard.loop_watch import Judge, LoaderRecord, watching_loop
from mrope.guard.sites import HostSyncError, Site, innermost
from mrope.guard.sync_guard import SyncGuard

__all__ = [
    "HostSyncError",
    "Judge",
    "LoaderRecord",
    "Site",
    "SyncGuard",
    "innermost",
    "watching_loop",
]
