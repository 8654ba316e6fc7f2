"""M-RoPE positions computed in DataLoader workers, so that the model's forward only reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mrope.collator import MRopeCollator
from mrope.errors import MRopeError, SpanMismatchError
from mrope.families import MRopeSpec
from mrope.layouts import to_batch_layout, to_model_layout
from mrope.positions import rope_index
from mrope.sampler import TokenBudgetSampler
from mrope.sharding import gather_sequence, shard_sequence
from mrope.vision import VisionSpec

if TYPE_CHECKING:
    from mrope.config import build_collator, load_config

__all__ = [
    "MRopeCollator",
    "MRopeError",
    "MRopeSpec",
    "SpanMismatchError",
    "TokenBudgetSampler",
    "VisionSpec",
    "build_collator",
    "gather_sequence",
    "load_config",
    "rope_index",
    "shard_sequence",
    "to_batch_layout",
    "to_model_layout",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # The config and its validation library load on first use: a worker, which imports this package
    # to unpickle the collator, never needs them.
    if name in ("build_collator", "load_config"):
        from mrope import config

        return getattr(config, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
