"""Seeded random batches of every shape that the positions must cover.

Python's own generator is used, so that the goldens' inputs are the same under every numpy.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mrope import MRopeSpec
from mrope.spec.families import FAMILIES, NO_TOKEN

# Every family with every reference that it was compared with.
ROWS = [(family, name) for family, row in FAMILIES.items() for name in row.references]
# Those with a class in transformers, and those compared with a published rule.
RELEASED_ROWS = [(family, name) for family, name in ROWS if FAMILIES[family].source is None]
PUBLISHED_ROWS = [(family, name) for family, name in ROWS if FAMILIES[family].source is not None]
# Those that `mrope.positions.rope_index` numbers; the others have rules of their own.
SPAN_ROWS = [(family, name) for family, name in ROWS if FAMILIES[family].custom_index is None]

# Families of frames apart whose clips have no token between two frames.
SIDE_BY_SIDE = ("hy_v4_vl", "KeyeVL")
TEXT_IDS = range(1, 50)
PAD_ID = 0
VISION_END_ID = 99
# Stands where other families have their start marker; it means nothing.
NO_START_ID = 98


@dataclass
class Row:
    """One sample under construction: tokens, their types, and the grids in their order.

    `touching` rows may have spans of one kind side by side, with no token between them.
    """

    tokens: list[int] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    images: list[list[int]] = field(default_factory=list)
    videos: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    touching: bool = False

    def add(self, token: int, count: int, kind: int = 0) -> None:
        self.tokens += [token] * count
        self.types += [kind] * count


def random_batch(rng: random.Random, spec: MRopeSpec, *, odd: bool = False) -> dict[str, Any]:
    """Return arguments for `rope_index`.

    Args:
        odd: also what no release can number: spans side by side, and rows without a token.
    """
    if spec.family_row.custom_index is not None and spec.family_row.source is None:
        from support.custom import RANDOM  # its modules build on this one

        return RANDOM[spec.family_row.custom_index](rng, spec)
    required = spec.conventions.start_required or spec.family == "neo_chat"
    marked = required or rng.random() < 0.7
    vision = rng.random() < 0.85
    rows = []
    for _ in range(rng.choice([1, 1, 2, 3, 5])):
        empty = odd and rng.random() < 0.1
        rows.append(Row() if empty else _random_row(rng, spec, marked, vision, odd))
    return merge_rows(rng, rows, padding=rng.choice(["left", "right", "ragged", "none"]))


def merge_rows(rng: random.Random, rows: list[Row], padding: str) -> dict[str, Any]:
    """Pad rows into a batch; "none" cuts every row's text tail to the shortest possible common width."""
    longest = max(len(row.tokens) for row in rows)
    width = longest + (rng.randrange(4) if padding == "ragged" else 0)
    if padding == "none":
        for row in rows:
            row.add(rng.choice(TEXT_IDS), longest - len(row.tokens))
    ids = np.full((len(rows), width), PAD_ID, np.int64)
    types = np.zeros_like(ids)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        where = _places(rng, len(row.tokens), width, padding)
        ids[index, where], types[index, where], mask[index, where] = row.tokens, row.types, 1
    images = [grid for row in rows for grid in row.images]
    videos = [grid for row in rows for grid in row.videos]
    no_mask = padding == "none" and rng.random() < 0.5
    return {
        "input_ids": ids,
        "attention_mask": None if no_mask else mask,
        "mm_token_type_ids": types,
        "image_grid_thw": np.array(images, np.int64) if images else None,
        "video_grid_thw": np.array(videos, np.int64) if videos else None,
        "second_per_grid_ts": _seconds(rng, rows),
    }


def _random_row(
    rng: random.Random, spec: MRopeSpec, marked: bool, vision: bool, touching: bool
) -> Row:
    row = Row(touching=touching)
    for _ in range(rng.randrange(5) if vision and rng.random() < 0.85 else 0):
        row.add(rng.choice(TEXT_IDS), rng.choice([0, 0, 1, 2, 5]))
        add = _add_image if rng.random() < 0.5 or not spec.family_row.video_keys else _add_video
        add(rng, spec, row, marked)
    row.add(rng.choice(TEXT_IDS), rng.choice([0, 1, 2, 7]) if row.tokens else rng.randrange(1, 9))
    return row


def _random_grid(rng: random.Random, spec: MRopeSpec, frames: int) -> list[int]:
    merge = spec.spatial_merge_size
    return [frames, merge * rng.choice([1, 1, 2, 3, 5]), merge * rng.choice([1, 2, 2, 4])]


def _add_image(rng: random.Random, spec: MRopeSpec, row: Row, marked: bool) -> None:
    frames = 1 if spec.family_row.still_images else rng.choice([1, 1, 1, 1, 2])
    grid = _random_grid(rng, spec, frames)
    row.images.append(grid)
    _add_span(rng, spec, row, grid, 1, marked)


def _add_video(rng: random.Random, spec: MRopeSpec, row: Row, marked: bool) -> None:
    least = int(spec.extra.get("temporal_merge_size", 1))
    grid = _random_grid(rng, spec, frames=max(least, rng.choice([1, 2, 3, 4, 9])))
    row.videos.append(grid)
    row.seconds.append(rng.choice([0.1, 0.25, 1 / 3, 0.4, 0.5, 0.8, 1.0, 1.5, 2.0, 2.7, 4.0]))
    if not spec.family_row.frames_apart or spec.family in SIDE_BY_SIDE:
        _add_span(rng, spec, row, [grid[0] // least, *grid[1:]], 2, marked)
        return
    markers = ("video_start_token_id", "video_end_token_id")
    start, end = (spec.extra.get(name) for name in markers)
    row.add(int(start or 0), 1 if start else 0)
    for frame in range(grid[0]):
        if spec.family == "openpangu_vl":
            row.add(VISION_END_ID, 2 if frame else 0)  # its end marker and its start marker
            row.add(spec.video_token_id, spec.frame_tokens(*grid[1:]), 2)
            continue
        _add_span(rng, spec, row, [1, *grid[1:]], 2, marked)
    row.add(int(end or 0), 1 if end else 0)


def _add_span(
    rng: random.Random, spec: MRopeSpec, row: Row, grid: list[int], kind: int, marked: bool
) -> None:
    tokens = grid[0] * spec.frame_tokens(*grid[1:])
    as_image = kind == 1 or spec.family_row.frames_as_images
    placeholder = spec.image_token_id if as_image else spec.video_token_id
    if marked:
        start = spec.vision_start_token_id
        row.add(NO_START_ID if start == NO_TOKEN else start, 1)
    elif not row.touching and row.types and row.types[-1] == kind:
        row.add(rng.choice(TEXT_IDS), 1)
    row.add(placeholder, tokens, kind)
    if marked and rng.random() < 0.9:
        row.add(VISION_END_ID, 1)


def _places(rng: random.Random, tokens: int, width: int, padding: str) -> list[int]:
    if padding == "left":
        return list(range(width - tokens, width))
    if padding == "ragged":
        return sorted(rng.sample(range(width), tokens))
    return list(range(tokens))


def _seconds(rng: random.Random, rows: list[Row]) -> Any:
    seconds = [value for row in rows for value in row.seconds]
    form = rng.choice(["list", "float32", "whole", "none"])
    if form == "none" or not seconds:
        return None
    if form == "whole":
        return [round(value) for value in seconds]
    return seconds if form == "list" else np.array(seconds, np.float32)
