"""After collating: shard batches for sequence parallelism, adapt them to other trainers."""

from __future__ import annotations

from mrope.transforms.adapters import to_ms_swift, to_veomni, to_verl
from mrope.transforms.responses import extend
from mrope.transforms.sharding import gather_sequence, shard_sequence
from mrope.transforms.token_map import TokenMap
from mrope.transforms.turns import as_text

__all__ = [
    "TokenMap",
    "as_text",
    "extend",
    "gather_sequence",
    "shard_sequence",
    "to_ms_swift",
    "to_veomni",
    "to_verl",
]
