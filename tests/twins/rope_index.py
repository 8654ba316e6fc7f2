"""A slow, obvious twin of the kernel: one token after another, in plain Python.

It is written from the rules, not from the kernel, and knows what no release can number: adjacent
spans, and rows without a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mrope import MRopeSpec
from mrope.spec.families import NO_TOKEN
from support.custom import SLOW
from twins.published import PUBLISHED


def slow_rope_index(spec: MRopeSpec, batch: dict[str, Any]) -> tuple[Any, Any]:
    """Return what `rope_index` must return for arguments as `batches.random_batch` makes them."""
    if spec.family_row.custom_index is not None and spec.family not in PUBLISHED:
        return SLOW[spec.family_row.custom_index](spec, batch)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    old = spec.reference == "transformers-4.57"
    rows, width = ids.shape
    spans = _spans(spec, batch)
    axes = 2 if spec.family == "hunyuan_image_3_moe" else 3
    positions = np.full((axes, rows, width), 1 if old else 0, np.int64)
    deltas = np.zeros((rows, 1), np.int64)
    text_batch = batch["image_grid_thw"] is None and batch["video_grid_thw"] is None
    for row in range(rows):
        valid = [col for col in range(width) if mask is None or mask[row, col]]
        numbers = _number_row(spec, [int(ids[row, col]) for col in valid], spans)
        for col, number in zip(valid, numbers, strict=True):
            positions[:, row, col] = number
        counting = [number[:1] if spec.family_row.ends_in_time else number for number in numbers]
        top = max((max(number) for number in counting), default=-1) + 1
        if axes == 2:
            top = len(valid)  # nothing is compressed
        if old and text_batch and mask is not None and len(valid) < width:
            top = max(top, 2)
        deltas[row, 0] = top - (width if old else len(valid))
    assert not spans[spec.image_token_id] and not spans[spec.video_token_id]
    return positions, deltas


def _number_row(spec: MRopeSpec, tokens: list[int], spans: dict[int, list[Any]]) -> list[Any]:
    if spec.family in PUBLISHED:
        media = {token: _taken(grids) for token, grids in spans.items() if token != NO_TOKEN}
        published: list[Any] = PUBLISHED[spec.family](spec, tokens, media)
        return published
    numbers: list[tuple[int, int, int]] = []
    cursor = 0
    at = 0
    while at < len(tokens):
        kind = _kind(spec, tokens, at)
        if kind not in spans or kind == NO_TOKEN:
            numbers.append((cursor, cursor, cursor))
            cursor, at = cursor + 1, at + 1
            continue
        times, height, width = spans[kind].pop(0)
        block = [
            (cursor + t, cursor + y, cursor + x)
            for t in times
            for y in range(height)
            for x in range(width)
        ]
        assert tokens[at : at + len(block)] == [tokens[at]] * len(block)
        numbers += block
        at += len(block)
        if spec.reference == "transformers-4.57":
            cursor = max(max(number) for number in block) + 1
        else:
            cursor += max(height, width)
    return numbers


def _taken(grids: list[Any]) -> Iterator[Any]:
    """Yield grids as they are asked for, and take them out of the list of the whole batch."""
    while grids:
        yield grids.pop(0)


def _kind(spec: MRopeSpec, tokens: list[int], at: int) -> int:
    """Return a token's id, or for an image token between a GLM video's markers the video's id."""
    if not spec.family.startswith("glm") or tokens[at] != spec.image_token_id:
        return tokens[at]
    before = tokens[: at + 1]
    starts = before.count(int(spec.extra["video_start_token_id"]))
    ends = before.count(int(spec.extra["video_end_token_id"]))
    return spec.video_token_id if starts > ends else spec.image_token_id


def _spans(spec: MRopeSpec, batch: dict[str, Any]) -> dict[int, list[Any]]:
    """Return for each placeholder id its spans in order: times of the frames, height, width."""
    merge = spec.spatial_merge_size
    spans: dict[int, list[Any]] = {spec.image_token_id: [], spec.video_token_id: []}
    if spec.family in PUBLISHED:
        for name, token in (("image", spec.image_token_id), ("video", spec.video_token_id)):
            spans[token] = _rows(batch[f"{name}_grid_thw"])
        return spans
    if spec.family == "hy_v4_vl":
        for name, token in (("image", spec.image_token_id), ("video", spec.video_token_id)):
            for t, h, w in _rows(batch[f"{name}_grid_thw"]):
                spans[token] += [([0], h // merge, w // merge + 1)] * t
        return spans
    timed = spec.family == "qwen2_5_vl"
    for t, h, w in _rows(batch["image_grid_thw"]):
        still = timed and spec.reference == "transformers-4.57"
        still_times, moving_times = [0] * t, list(range(t))
        times = still_times if still else moving_times
        spans[spec.image_token_id].append((times, h // merge, w // merge))
    for video, (t, h, w) in enumerate(_rows(batch["video_grid_thw"])):
        if spec.family in ("qwen2_vl", "qwen2_5_vl", "paddleocr_vl", "ernie4_5_vl_moe"):
            steps = t // 2 if spec.family == "ernie4_5_vl_moe" else t
            seconds = batch["second_per_grid_ts"]
            times = _times(spec, seconds, video, t) if timed else list(range(steps))
            spans[spec.video_token_id].append((list(times), h // merge, w // merge))
        else:
            spans[spec.video_token_id] += [([0], h // merge, w // merge)] * t
    return spans


def _times(spec: MRopeSpec, seconds: Any, video: int, frames: int) -> list[int]:
    rate = spec.tokens_per_second
    assert rate is not None
    if seconds is None:
        return [frame * rate for frame in range(frames)]
    value = seconds[video]
    if spec.reference != "transformers-5.23" or isinstance(value, int):
        return [frame * rate * int(value) for frame in range(frames)]
    step = np.float32(rate) * value if isinstance(value, np.float32) else np.float32(rate * value)
    return [int(np.float32(frame) * step) for frame in range(frames)]


def _rows(grid: Any) -> list[Any]:
    return [] if grid is None else [tuple(map(int, row)) for row in grid]
