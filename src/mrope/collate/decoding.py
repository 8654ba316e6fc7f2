"""Say once what decoding with an unmodified model needs."""

from __future__ import annotations

import logging
import sys
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

_log = logging.getLogger("mrope")


def remind_of_rope_deltas(rope_deltas: Any) -> None:
    """Log a warning if a transformers model may decode behind a batch at wrong positions.

    Given `position_ids`, such a model does not store `rope_deltas`, unless `mrope.hf` was imported.
    Nothing is imported to find out: a worker that was spawned without transformers logs nothing.

    Args:
        rope_deltas: int64 (B, 1) of a batch without labels: those with labels are for training,
            where nothing is decoded.
    """
    loaded = "transformers.modeling_utils" in sys.modules and "mrope.hf" not in sys.modules
    if loaded and np.any(rope_deltas):
        worker = get_worker_info()
        if worker is None or worker.id == 0:
            _warn_once()


@lru_cache(maxsize=1)
def _warn_once() -> None:
    _log.warning(
        "Batches without labels come with position_ids, and transformers is loaded: an unmodified "
        "model that decodes behind such a batch gives the next token a wrong position. "
        "`import mrope.hf` before the first batch lets models keep the batch's rope_deltas; "
        "`generate` computes positions itself, and needs nothing."
    )
