"""Implementations that the benchmarks compare `mrope` with, each with the same results.

- `per_span_rope_index`: numpy, a loop over rows and spans (`python -m measure positions`).
- `vision_functions`: `transformers.vision_utils` (`python -m measure vision`).
- `RowsOnHost`: numpy inside the forward, a copy per row (`python -m measure step`).
- `rope_index_on_device`: torch operations on the GPU (`python -m measure step`, on CUDA).

The three written here follow Qwen3-VL in transformers 5.x on well-formed batches. Shapes: B rows,
S tokens, grids (N, 3) of time, height and width in patches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mrope.errors import MRopeError
from mrope.positions.rope_index import rope_index
from mrope.spec.spec import MRopeSpec

IntArray = npt.NDArray[np.int64]


def per_span_rope_index(
    spec: MRopeSpec,
    input_ids: IntArray,
    attention_mask: IntArray,
    image_grid_thw: IntArray,
    video_grid_thw: IntArray,
) -> tuple[IntArray, IntArray]:
    """Compute position ids (3, B, S) and rope deltas (B, 1) by a loop over spans.

    Trainers that vectorise `get_rope_index` inside the forward do it in this way. Only for families
    in which each frame of a video is a span of its own; checks nothing.
    """
    position_ids = np.zeros((3, *input_ids.shape), np.int64)
    rope_deltas = np.empty((len(input_ids), 1), np.int64)
    merge = spec.spatial_merge_size
    images = iter((image_grid_thw[:, 1:] // merge).tolist())
    frames = iter((video_grid_thw[:, 1:] // merge).repeat(video_grid_thw[:, 0], axis=0).tolist())
    for row in range(len(input_ids)):
        valid = attention_mask[row] == 1
        tokens = input_ids[row][valid]
        positions = np.empty((3, len(tokens)), np.int64)
        at = cursor = 0
        for start, is_image in _span_starts(spec, tokens):
            height, wide = next(images if is_image else frames)
            positions[:, at:start] = np.arange(cursor, cursor + start - at)
            cursor += start - at
            at = start + height * wide
            positions[0, start:at] = cursor
            positions[1, start:at] = np.repeat(np.arange(height), wide) + cursor
            positions[2, start:at] = np.tile(np.arange(wide), height) + cursor
            cursor += max(height, wide)
        positions[:, at:] = np.arange(cursor, cursor + len(tokens) - at)
        position_ids[:, row, valid] = positions
        rope_deltas[row] = positions.max() + 1 - len(tokens)
    return position_ids, rope_deltas


def _span_starts(spec: MRopeSpec, tokens: IntArray) -> list[tuple[int, bool]]:
    """Return the index of each span's first placeholder, and whether the span is an image."""
    image = tokens == spec.image_token_id
    kind = image * 1 + (tokens == spec.video_token_id) * 2
    starts = np.flatnonzero((kind[1:] != kind[:-1]) & (kind[1:] > 0)) + 1
    return list(zip(starts.tolist(), image[starts].tolist(), strict=True))


def vision_functions() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Return transformers' functions for rotary ids, window index and interpolation.

    Raises:
        MRopeError: transformers is older than 5.15 or not installed.
    """
    try:
        from transformers.vision_utils import (
            get_vision_interpolation_indices_and_weights,
            get_vision_position_ids,
            get_vision_window_index,
        )
    except ImportError as error:
        raise MRopeError(
            f"this benchmark compares with transformers 5.15 or later: {error}"
        ) from error
    return (
        get_vision_position_ids,
        get_vision_window_index,
        get_vision_interpolation_indices_and_weights,
    )


class RowsOnHost:
    """Compute positions on the host inside the forward, in place of a model's `get_rope_index`.

    Trainers reduce O(batch + images + frames) syncs in this way: the inputs are read once, and one
    sync and one copy per row remain.
    """

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
        """Return position ids (3, B, S) and rope deltas (B, 1), int64, on the inputs' device."""
        ids = input_ids.cpu().numpy()
        mask = np.ones_like(ids) if attention_mask is None else attention_mask.cpu().numpy()
        images = None if image_grid_thw is None else image_grid_thw.cpu().numpy()
        videos = None if video_grid_thw is None else video_grid_thw.cpu().numpy()
        position_ids, rope_deltas = rope_index(self.spec, ids, mask, images, videos)
        out = torch.empty((3, *ids.shape), dtype=torch.int64, device=input_ids.device)
        for row in range(len(ids)):
            out[:, row] = torch.from_numpy(position_ids[:, row].copy()).to(out.device)
        return out, torch.from_numpy(rope_deltas).to(out.device)


def rope_index_on_device(
    spec: MRopeSpec,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    image_grid_thw: torch.Tensor,
    video_grid_thw: torch.Tensor,
    frames: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute position ids (3, B, S) and rope deltas (B, 1) on the inputs' device, without a sync.

    Costs about forty kernel launches in each forward. Cannot check its inputs, as an error would
    have to be read back: a row that lost an image silently gets its neighbour's grid. Two spans of
    one kind without a token between them are taken for one.

    Args:
        frames: frames of all videos, known on the host; reading them from the grids is a sync.
    """
    valid = attention_mask.bool()
    tokens = torch.where(valid, input_ids, -1)
    kind = (tokens == spec.image_token_id) + 2 * (tokens == spec.video_token_id)
    before = torch.nn.functional.pad(kind[:, :-1], (1, 0))
    first = (kind != before) & (kind > 0)
    # Span k of a kind has grid k of that kind. Every token looks its grid up, so that no shape
    # depends on a value.
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
