"""Name what makes training steps slow on this machine, for `mrope doctor`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from mrope.hf.fused import find_refusal
from mrope.hf.varlen import HAS_KERNEL

if TYPE_CHECKING:
    from mrope.training.sections import Config

_LINEAR = "linear_attention"


def list_slow_parts(cfg: Config | None = None) -> Iterator[str]:
    """Yield a line for each thing that slows steps down, and what removes it.

    Args:
        cfg: a training config, whose settings are looked at too; None: the machine alone.
    """
    if _has_linear_layers(cfg):
        yield from _linear_layers()
    if torch.__version__.startswith("2.9."):
        yield (
            f"torch {torch.__version__} runs the Conv3d of patch embeddings slowly in half "
            "precision (pytorch#174051); install another release"
        )
    if not HAS_KERNEL:
        yield (
            f"torch {torch.__version__} has no variable-length attention kernel: attached towers "
            "call attention once for each run of equal frames; install torch 2.10 or later"
        )
    yield from _memory(cfg)


def _linear_layers() -> Iterator[str]:
    if importlib.util.find_spec("fla") is None:
        yield (
            "flash-linear-attention is not installed: linear layers (Qwen3.5) run as plain torch "
            "operations, chunk by chunk; pip install flash-linear-attention"
        )
    elif torch.cuda.is_available() and (why := find_refusal()) is not None:
        yield why


def _memory(cfg: Config | None) -> Iterator[str]:
    if not torch.cuda.is_available():
        yield "no CUDA device: pinned memory was not tried"
        return
    try:
        torch.empty(1).pin_memory()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        yield f"memory cannot be pinned ({reason}): each copy of a batch to the GPU is a sync"
    if cfg is not None and not cfg.dataloader.pin_memory:
        yield (
            "dataloader.pin_memory is false: each copy of a batch to the GPU is a sync; set it to "
            "true"
        )


def _has_linear_layers(cfg: Config | None) -> bool:
    """Return whether a config's model has linear layers; without a config some models have."""
    if cfg is None:
        return True
    from mrope.training.model import load_model_config

    live = load_model_config(cfg)
    kinds = getattr(getattr(live, "text_config", live), "layer_types", None) or ()
    return _LINEAR in kinds
