"""Find what makes the host sync with a CUDA device, on a machine without one."""

from mrope.guard.sites import HostSyncError, Site
from mrope.guard.sync_guard import SyncGuard

__all__ = ["HostSyncError", "Site", "SyncGuard"]
