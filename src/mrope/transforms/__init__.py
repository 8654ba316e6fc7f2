"""After collating: shard batches for sequence parallelism, adapt them to other trainers."""

from __future__ import annotations

from mrope.transforms.adapters import to_ms_swift, to_veomni, to_verl
from mrope.transforms.sharding import gather_sequence, shard_sequence

__all__ = ["gather_sequence", "shard_sequence", "to_ms_swift", "to_veomni", "to_verl"]
