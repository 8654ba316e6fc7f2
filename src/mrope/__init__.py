"""M-RoPE positions computed in DataLoader workers, so that the model's forward only reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mrope.collate.collator import MRopeCollator
from mrope.collate.ladder import Shapes
from mrope.collate.layouts import to_batch_layout, to_model_layout
from mrope.errors import MRopeError, SpanMismatchError
from mrope.positions.rope_index import rope_index
from mrope.prepare.sampler import TokenBudgetSampler
from mrope.spec.spec import MRopeSpec
from mrope.towers import VisionSpec
from mrope.transforms.sharding import gather_sequence, shard_sequence

if TYPE_CHECKING:
    from mrope.training.config import build_collator, load_config

__all__ = [
    "MRopeCollator",
    "MRopeError",
    "MRopeSpec",
    "Shapes",
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
        from mrope.training import config

        return getattr(config, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
