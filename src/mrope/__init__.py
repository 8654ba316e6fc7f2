"""M-RoPE positions computed in DataLoader workers, so that the model's forward only reads them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mrope.collate.collator import MRopeCollator
    from mrope.collate.ladder import Shapes
    from mrope.collate.layouts import to_batch_layout, to_model_layout
    from mrope.errors import MRopeError, SpanMismatchError
    from mrope.positions.rope_index import rope_index
    from mrope.prepare.sampler import TokenBudgetSampler
    from mrope.spec.spec import MRopeSpec
    from mrope.towers import VisionSpec
    from mrope.training.config import build_collator, load_config
    from mrope.transforms.sharding import gather_sequence, shard_sequence

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

_MODULES = {
    "MRopeCollator": "mrope.collate.collator",
    "MRopeError": "mrope.errors",
    "MRopeSpec": "mrope.spec.spec",
    "Shapes": "mrope.collate.ladder",
    "SpanMismatchError": "mrope.errors",
    "TokenBudgetSampler": "mrope.prepare.sampler",
    "VisionSpec": "mrope.towers",
    "build_collator": "mrope.training.config",
    "gather_sequence": "mrope.transforms.sharding",
    "load_config": "mrope.training.config",
    "rope_index": "mrope.positions.rope_index",
    "shard_sequence": "mrope.transforms.sharding",
    "to_batch_layout": "mrope.collate.layouts",
    "to_model_layout": "mrope.collate.layouts",
}


def __getattr__(name: str) -> Any:
    # A name loads its module on first use: `mrope --version` loads no torch, and a worker, which
    # imports this package to unpickle the collator, no validation library of the config.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
