"""The places in the code that sync, and the error that names one."""

from __future__ import annotations

import contextlib
import os
import sys
import types
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from mrope.errors import MRopeError

Frames = Iterable[tuple[str, int, str]]
"""(file, line, function) of stack frames, innermost first."""

TORCH = str(Path(torch.__file__).parent) + os.sep
# Frames that are never the place to look at: torch, this guard, and how warnings reach it.
_HIDDEN = (
    TORCH,
    str(Path(__file__).parent) + os.sep,
    contextlib.__file__,
    warnings.__file__,
)


class HostSyncError(MRopeError):
    """The host would sync with the device here; raised under `SyncGuard(mode="error")`."""


@dataclass(frozen=True)
class Site:
    """A place in the code that syncs.

    Attributes:
        file, line, function: innermost frame outside torch.
        op: what syncs there; in a backward with the name of the autograd node.
        count: number of syncs.
    """

    file: str
    line: int
    function: str
    op: str
    count: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}: {self.op}, {self.count} times"


def present_frames() -> Iterator[tuple[str, int, str]]:
    """Yield the caller's stack frames, innermost first."""
    frame: types.FrameType | None = sys._getframe(1)  # noqa: SLF001
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back


def innermost(frames: Frames) -> tuple[str, int, str]:
    """Return file, line and function of the innermost frame outside torch.

    A shared helper of transformers, such as a mask builder, means little without its caller: the
    function then also names the innermost frame in a modelling file.
    """
    visible = [frame for frame in frames if not frame[0].startswith(_HIDDEN)]
    if not visible:
        return "?", 0, "?"
    file, line, function = visible[0]
    if "/transformers/" in file and "/models/" not in file:
        model = next((frame for frame in visible if "/modeling_" in frame[0]), None)
        if model is not None:
            function += f" via {Path(model[0]).name}:{model[1]} {model[2]}"
    return file, line, function
