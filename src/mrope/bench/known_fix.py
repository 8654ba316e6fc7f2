"""The rival of `mrope bench step`: positions in the forward, one row after another, in numpy.

What trainers do today against O(batch + images + frames) waits: pull the inputs to the host once,
number each row there, and copy each row back. One wait and a copy per row are left.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mrope.positions.rope_index import rope_index
from mrope.spec.spec import MRopeSpec


class RowsOnHost:
    """Stands in for the `get_rope_index` of a model."""

    def __init__(self, spec: MRopeSpec) -> None:
        self.spec = spec

    def __call__(
        self,
        input_ids: torch.Tensor,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return position ids (3, B, S) and rope deltas (B, 1) on the inputs' device."""
        ids = input_ids.cpu().numpy()
        mask = np.ones_like(ids) if attention_mask is None else attention_mask.cpu().numpy()
        images = None if image_grid_thw is None else image_grid_thw.cpu().numpy()
        videos = None if video_grid_thw is None else video_grid_thw.cpu().numpy()
        position_ids, rope_deltas = rope_index(self.spec, ids, mask, images, videos)
        out = torch.empty((3, *ids.shape), dtype=torch.int64, device=input_ids.device)
        for row in range(len(ids)):
            out[:, row] = torch.from_numpy(position_ids[:, row].copy()).to(out.device)
        return out, torch.from_numpy(rope_deltas).to(out.device)
