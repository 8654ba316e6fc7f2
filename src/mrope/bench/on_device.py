"""The alternative that a reader will ask about: the same numbers from torch operations on the GPU.

It never waits either: everything is computed token by token, so that no size depends on a value. It
costs some forty kernel launches in every forward, and it can check nothing, since an error would
have to be read back: a row that lost an image takes its neighbour's grid unnoticed. Spans that
stand side by side cannot be told apart. The rule is that of Qwen3-VL in transformers 5.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from mrope.spec.spec import MRopeSpec


def rope_index_on_device(
    spec: MRopeSpec,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    image_grid_thw: torch.Tensor,
    video_grid_thw: torch.Tensor,
    frames: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return position ids (3, B, S) and rope deltas (B, 1) for well-formed batches.

    Args:
        frames: frames of all clips; the host must know it, or the device would be waited for.
    """
    valid = attention_mask.bool()
    tokens = torch.where(valid, input_ids, -1)
    kind = (tokens == spec.image_token_id) + 2 * (tokens == spec.video_token_id)
    before = torch.nn.functional.pad(kind[:, :-1], (1, 0))
    first = (kind != before) & (kind > 0)
    # The k-th span of a kind has the k-th grid of that kind: the batch is one stream of spans.
    video_sizes = video_grid_thw[:, 1:].repeat_interleave(
        video_grid_thw[:, 0], dim=0, output_size=frames
    )
    sizes = torch.cat([image_grid_thw[:, 1:], video_sizes]) // spec.spatial_merge_size
    image_number = (first & (kind == 1)).flatten().cumsum(0) - 1
    video_number = (first & (kind == 2)).flatten().cumsum(0) - 1 + len(image_grid_thw)
    number = torch.where(kind.flatten() == 1, image_number, video_number).clamp(0, len(sizes) - 1)
    height, width = sizes[number].T.reshape(2, *tokens.shape)
    # A text token moves the cursor by one; a span moves it by its larger side, at its last token.
    column = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    start = torch.where(first, column, 0).cummax(1).values
    within = column - start
    last = (kind > 0) & (within == height * width - 1)
    moves = torch.where(kind == 0, valid.long(), last * torch.maximum(height, width))
    base = moves.cumsum(1) - moves
    spatial = torch.stack([torch.zeros_like(within), within // width, within % width])
    positions = (base + torch.where(kind > 0, spatial, 0)) * valid
    top = positions.amax(dim=(0, 2)) + 1
    return positions, (top - valid.sum(1))[:, None]


def time_on_device(spec: MRopeSpec, batch: dict[str, Any], repeats: int = 30) -> dict[str, float]:
    """Return medians of milliseconds: of the host until the call returns, and of the whole."""
    names = ("input_ids", "attention_mask", "image_grid_thw", "video_grid_thw")
    arguments = {name: batch[name] for name in names}
    frames = int(batch["video_grid_thw"][:, 0].sum())
    host, whole = [], []
    for _ in range(repeats + 5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        rope_index_on_device(spec, **arguments, frames=frames)
        host.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        whole.append(time.perf_counter() - start)
    return {
        "host_ms": 1e3 * statistics.median(host[5:]),
        "whole_ms": 1e3 * statistics.median(whole[5:]),
    }
