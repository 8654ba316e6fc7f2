"""Let CUDA itself report syncs, where a process uses a CUDA device."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch

from mrope.guard.sites import Frames

_SYNCHRONIZES = "called a synchronizing CUDA operation"
_OP = "CUDA synchronizes"


def is_used() -> bool:
    """Return whether this process holds tensors on a CUDA device."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):  # type: ignore[no-untyped-call]
        return False
    return any(map(torch.cuda.memory_allocated, range(torch.cuda.device_count())))


@contextlib.contextmanager
def reporting(
    found: Callable[[str, Frames | None], None], mode: Literal["warn", "error"]
) -> Iterator[None]:
    """Set torch's sync debug mode for a block, and call `found` for each sync that it reports.

    Args:
        found: called with a name, and with the frames of the sync; None: the present ones.
        mode: of `torch.cuda.set_sync_debug_mode`.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def showwarning(message: Warning | str, *rest: Any, **named: Any) -> None:
            # Warnings of a backward come from the autograd thread, and Python gets them at the end
            # of the backward: their place is the line that called it.
            if _SYNCHRONIZES in str(message):
                found(_OP, None)
            else:
                show(message, *rest, **named)

        warnings.filterwarnings("always", message=f".*{_SYNCHRONIZES}")
        warnings.filterwarnings("ignore", message=".*Synchronization debug mode is a prototype")
        warnings.showwarning = showwarning
        torch.cuda.set_sync_debug_mode(mode)
        try:
            yield
        except RuntimeError as error:
            if _SYNCHRONIZES not in str(error):
                raise
            frames = reversed(traceback.extract_tb(error.__traceback__))
            found(_OP, [(one.filename, one.lineno or 0, one.name) for one in frames])
        finally:
            torch.cuda.set_sync_debug_mode(before)
