"""Find every place where the host would sync with a CUDA device, without one.

A guarded block runs for real, on CPU tensors with real values, and torch's own modes watch it.
Every tensor counts as a device tensor, except host tensors: those made inside the block without a
device (`torch.tensor([1])`, `torch.from_numpy`), those moved to the host (`.cpu()`), those that are
declared (`SyncGuard(host=[...])`), and what is computed from host tensors alone.

If this process holds tensors on a CUDA device, `torch.cuda.set_sync_debug_mode` reports instead.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

import torch

from mrope.errors import MRopeError
from mrope.guard import cuda_debug
from mrope.guard.calls import outer_calls, watching
from mrope.guard.operators import in_backward
from mrope.guard.sites import Frames, HostSyncError, Site, innermost, present_frames


class SyncGuard:
    """Count the syncs of a block of code, forward and backward.

    Args:
        mode: "warn" counts; "error" raises at the first sync.
        host: tensors that live on the host by design, such as a grid that is kept on the CPU.

    Raises:
        MRopeError: an unknown mode; on entry, if the guard watches a block already.
        HostSyncError: under "error", at the first sync, or at the end of the block if the block
            caught it.

    One sync is one read, copy or compression that user code or a library asks for, however many
    transfers it takes below (printing a tensor is one).

    Example:
        >>> x = torch.ones(3)
        >>> with SyncGuard() as guard:
        ...     y = (x * 2).sum()
        ...     if y > 5:
        ...         kept = x[x > 0]
        >>> guard.count, sorted(site.op for site in guard.sites)
        (2, ['indexing by a mask', 'scalar read'])
    """

    def __init__(
        self, mode: Literal["warn", "error"] = "warn", host: Iterable[torch.Tensor] = ()
    ) -> None:
        if mode not in ("warn", "error"):
            raise MRopeError(f"mode must be 'warn' or 'error', not {mode!r}")
        self.mode = mode
        self._found: Counter[tuple[str, int, str, str]] = Counter()
        self._declared = tuple(host)
        self._stack: contextlib.ExitStack | None = None

    def __enter__(self) -> SyncGuard:  # noqa: PYI034 - Self needs Python 3.11
        if self._stack is not None:
            raise MRopeError(
                "this SyncGuard watches a block already; make another for a block in it"
            )
        # A guard may be used for one block after another; each counts anew.
        self._found.clear()
        with contextlib.ExitStack() as stack:
            if cuda_debug.is_used():
                stack.enter_context(cuda_debug.reporting(self.found, self.mode))
            else:
                # A nested guard shares the watch of the outer one, so that both agree on places.
                calls = outer_calls() or stack.enter_context(watching())
                raises = self.mode == "error"
                stack.enter_context(calls.reporting(self.found, raises=raises, host=self._declared))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:  # noqa: PYI036 - passed on unread
        assert self._stack is not None
        try:
            self._stack.__exit__(*exception)
        finally:
            self._stack = None
        if self.mode == "error" and self._found and exception[0] is not HostSyncError:
            raise self._error()  # the block caught it: `except ValueError` is common

    @property
    def count(self) -> int:
        """Number of syncs."""
        return self._found.total()

    @property
    def sites(self) -> list[Site]:
        """The places that sync, most frequent first."""
        return [Site(*place, count) for place, count in self._found.most_common()]

    def report(self) -> str:
        """Return a line for each site, and the sum."""
        lines = [str(site) for site in self.sites]
        return "\n".join([*lines, f"{self.count} syncs at {len(lines)} sites"])

    def found(self, op: str, frames: Frames | None = None) -> None:
        """Record one sync.

        Args:
            op: what syncs.
            frames: of the stack, innermost first; None: the present ones.

        Raises:
            HostSyncError: under `mode="error"`.
        """
        if self._stack is None:
            return  # a hook that the block registered, in a backward after the block
        op += in_backward()
        file, line, function = innermost(present_frames() if frames is None else frames)
        self._found[file, line, function, op] += 1
        if self.mode == "error":
            raise self._error()

    def _error(self) -> HostSyncError:
        file, line, function, op = next(iter(self._found))
        return HostSyncError(f"the host syncs with the device at {file}:{line} {function}: {op}")
