"""The rival of `mrope bench positions`: numpy, one span after another.

It stands for the known fix of trainers, which vectorises the numbering inside the forward: a loop
over rows, and within each row a loop over spans, each of which is numbered by array operations. It
follows the Qwen3-VL rule of transformers 5.x, on well-formed batches, and checks nothing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mrope.spec.spec import MRopeSpec

IntArray = npt.NDArray[np.int64]


def per_span_rope_index(
    spec: MRopeSpec,
    input_ids: IntArray,
    attention_mask: IntArray,
    image_grid_thw: IntArray,
    video_grid_thw: IntArray,
) -> tuple[IntArray, IntArray]:
    """Return what `mrope.rope_index` returns, for a family whose frames stand apart."""
    rows, width = input_ids.shape
    position_ids = np.zeros((3, rows, width), np.int64)
    rope_deltas = np.empty((rows, 1), np.int64)
    merge = spec.spatial_merge_size
    images = iter((image_grid_thw[:, 1:] // merge).tolist())
    frames = iter((video_grid_thw[:, 1:] // merge).repeat(video_grid_thw[:, 0], axis=0).tolist())
    for row in range(rows):
        valid = attention_mask[row] == 1
        tokens = input_ids[row][valid]
        numbers = np.empty((3, len(tokens)), np.int64)
        at = cursor = 0
        for start, is_image in _span_starts(spec, tokens):
            height, wide = next(images if is_image else frames)
            numbers[:, at:start] = np.arange(cursor, cursor + start - at)
            cursor += start - at
            at = start + height * wide
            numbers[0, start:at] = cursor
            numbers[1, start:at] = np.repeat(np.arange(height), wide) + cursor
            numbers[2, start:at] = np.tile(np.arange(wide), height) + cursor
            cursor += max(height, wide)
        numbers[:, at:] = np.arange(cursor, cursor + len(tokens) - at)
        position_ids[:, row, valid] = numbers
        rope_deltas[row] = numbers.max() + 1 - len(tokens)
    return position_ids, rope_deltas


def _span_starts(spec: MRopeSpec, tokens: IntArray) -> list[tuple[int, bool]]:
    """Return where each run of placeholders starts, and whether it is an image's."""
    image = tokens == spec.image_token_id
    kind = image * 1 + (tokens == spec.video_token_id) * 2
    starts = np.flatnonzero((kind[1:] != kind[:-1]) & (kind[1:] > 0)) + 1
    return list(zip(starts.tolist(), image[starts].tolist(), strict=True))
