"""Run a model on a batch by hand, as benchmarks and reports do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mrope.collate.layouts import to_model_layout
from mrope.errors import MRopeError
from mrope.guard import SyncGuard


def guarded_step(model: torch.nn.Module, batch: Mapping[str, Any]) -> SyncGuard:
    """Run forward and backward of one step under a guard, and return the guard.

    Gradients are reset first and stay set; no optimizer runs.
    """
    model.zero_grad()
    with SyncGuard() as guard:
        model(**batch).loss.backward()
    return guard


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the batch in model layout, with its tensors on the device.

    Ints, bools and lists stay on the host, where attached models read them without a sync.
    """
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in to_model_layout(batch).items()
    }


def finish(device: torch.device) -> None:
    """Block until a CUDA device is done; other devices run in step with the host."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def choose_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is CUDA if torch sees one.

    Raises:
        MRopeError: "cuda", and torch sees none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise MRopeError(
            "the device is cuda, but torch sees no CUDA device: choose cpu or auto, or install a "
            "CUDA build of torch"
        )
    return torch.device(name)
