"""Random MiniCPM-V batches, and their rule as plain Python: what each token is, and so where."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mrope import MRopeSpec
from support.batches import TEXT_IDS, Row, merge_rows

START, IMAGE, VIDEO, END, SLICE, SLICE_END, NEWLINE = range(101, 108)
NUMBERS = {
    "image_end_id": END,
    "slice_start_id": SLICE,
    "slice_end_id": SLICE_END,
    "newline_id": NEWLINE,
}
MARKERS = {START, *NUMBERS.values()}
PADDINGS = ("left", "right", "ragged", "none")

Point = tuple[int, int, int]
Side = tuple[int, int]


def minicpm_spec(merge: int = 4) -> MRopeSpec:
    return MRopeSpec("minicpmv4_7", "transformers-5.23", IMAGE, VIDEO, START, merge, extra=NUMBERS)


class Misfit(Exception):
    """The twin's word for a batch that cannot be numbered."""


@dataclass
class Crop:
    start: int
    end: int
    kind: int
    size: Side


@dataclass
class Frame:
    """A thumbnail and its slices; tokens from `start` to before `end` are the frame's."""

    thumb: Crop
    slices: list[Crop]
    end: int = 0

    @property
    def start(self) -> int:
        return self.thumb.start - 1

    @property
    def columns(self) -> int:
        count = len(self.slices)
        for index, (left, right) in enumerate(zip(self.slices, self.slices[1:], strict=False)):
            if right.start - left.end > 2:
                count = index + 1
                break
        return count if len(self.slices) % count == 0 else len(self.slices)

    @property
    def tile(self) -> Side:
        return self.slices[0].size

    @property
    def canvas(self) -> Side:
        if not self.slices:
            return self.thumb.size
        lines = len(self.slices) // self.columns
        return lines * self.tile[0], self.columns * self.tile[1]


def slow_index(merge: int, batch: dict[str, Any]) -> tuple[Any, Any]:
    """Number one token after another.

    Raises:
        Misfit: tokens and sizes do not fit together.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    sizes = {IMAGE: _sizes(batch, "target_sizes"), VIDEO: _sizes(batch, "target_sizes_videos")}
    positions = np.zeros((3, *ids.shape), np.int64)
    tokens_in_row = []
    for row in range(len(ids)):
        columns = [c for c in range(ids.shape[1]) if mask is None or mask[row, c]]
        tokens = ids[row, columns].tolist()
        frames = _frames(tokens, _crops(tokens, merge, sizes))
        for column, point in zip(columns, _walk(tokens, frames), strict=True):
            positions[:, row, column] = point
        tokens_in_row.append(len(columns))
    if sizes[IMAGE] or sizes[VIDEO]:
        raise Misfit
    largest = [int(positions[:, row].max(initial=0)) for row in range(len(ids))]
    deltas = [[top + 1 - n] for top, n in zip(largest, tokens_in_row, strict=True)]
    return positions, np.array(deltas, np.int64).reshape(-1, 1)


def _sizes(batch: dict[str, Any], name: str) -> list[list[int]]:
    return [] if batch[name] is None else list(batch[name].tolist())


def _crops(tokens: list[int], merge: int, sizes: dict[int, list[list[int]]]) -> list[Crop]:
    crops: list[Crop] = []
    for number, kind in enumerate(tokens):
        if kind not in sizes:
            continue
        if crops and crops[-1].end == number and crops[-1].kind == kind:
            crops[-1].end += 1
            continue
        if not sizes[kind]:
            raise Misfit
        height, width = sizes[kind].pop(0)
        crops.append(Crop(number, number + 1, kind, (height // merge, width // merge)))
    if any(crop.end - crop.start != crop.size[0] * crop.size[1] for crop in crops):
        raise Misfit
    return crops


def _frames(tokens: list[int], crops: list[Crop]) -> list[Frame]:
    frames: list[Frame] = []
    before: Crop | None = None
    for crop in crops:
        opening = tokens[crop.start - 1] if crop.start else None
        if opening == START:
            frames.append(Frame(crop, []))
        elif opening == SLICE and before is not None and before.kind == crop.kind:
            if not MARKERS.issuperset(tokens[before.end : crop.start]):
                raise Misfit
            frames[-1].slices.append(crop)
        else:
            raise Misfit
        before = crop
    for frame in frames:
        frame.end = [frame.thumb, *frame.slices][-1].end
        while frame.end < len(tokens) and tokens[frame.end] in MARKERS:
            frame.end += 1
    return frames


def _walk(tokens: list[int], frames: list[Frame]) -> list[Point]:
    points: list[Point] = []
    here = origin = 0
    frame: Frame | None = None
    for number in range(len(tokens)):
        for begun in frames:
            if begun.start == number:
                frame, origin = begun, here
                here += max(begun.canvas) + 1
        if frame is not None and number < frame.end:
            points.append(_place(frame, number, origin))
        else:
            points.append((here, here, here))
            here += 1
    return points


def _place(frame: Frame, number: int, origin: int) -> Point:
    """Ask of one token of a frame what it is."""
    if number == frame.start:
        return origin, max(origin - 1, 0), max(origin - 1, 0)
    line, column = _on_canvas(frame, number)
    return origin, origin + line, origin + column


def _on_canvas(frame: Frame, number: int) -> Side:
    thumb, columns = frame.thumb, frame.columns if frame.slices else 1
    if thumb.start <= number < thumb.end:
        line, column = divmod(number - thumb.start, thumb.size[1])
        height, width = (
            torch.linspace(0, over - 1, cells).round().long().tolist()
            for over, cells in zip(frame.canvas, thumb.size, strict=True)
        )
        return height[line], width[column]
    for index, crop in enumerate(frame.slices):
        top, left = index // columns * frame.tile[0], index % columns * frame.tile[1]
        if number == crop.start - 1:
            return top, left
        if crop.start <= number < crop.end:
            line, column = divmod(number - crop.start, crop.size[1])
            return top + line, left + column
        following = frame.slices[index + 1].start - 1 if index + 1 < len(frame.slices) else -1
        if number == crop.end != following:
            return top + crop.size[0] - 1, left + crop.size[1] - 1
        if crop.end < number < following:
            return top + frame.tile[0] - 1, columns * frame.tile[1]
    return frame.canvas if number == thumb.end else (0, 0)


def random_batch(rng: random.Random, merge: int, *, empty: bool = False) -> dict[str, Any]:
    rows = []
    for _ in range(rng.choice([1, 1, 2, 3, 4])):
        row = Row()
        rows.append(row)
        if empty and rng.random() < 0.1:
            continue
        for _ in range(rng.choice([0, 1, 1, 2, 4])):
            _add_text(rng, row)
            add = _add_image if rng.random() < 0.6 else _add_video
            add(rng, row, merge)
        row.add(rng.choice(TEXT_IDS), rng.choice([0, 1, 7]) if row.tokens else rng.randrange(1, 9))
    batch = merge_rows(rng, rows, rng.choice(PADDINGS))
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "mm_token_type_ids": batch["mm_token_type_ids"],
        "target_sizes": batch["image_grid_thw"],
        "target_sizes_videos": batch["video_grid_thw"],
        "images_per_sample": np.array([len(row.images) for row in rows]),
        "videos_per_sample": np.array([len(row.videos) for row in rows]),
    }


def _add_text(rng: random.Random, row: Row) -> None:
    for token in rng.choices([*TEXT_IDS, NEWLINE], k=rng.choice([0, 0, 1, 3])):
        row.add(token, 1)


def _add_image(rng: random.Random, row: Row, merge: int) -> None:
    _add_frame(rng, row, merge, IMAGE, row.images)


def _add_video(rng: random.Random, row: Row, merge: int) -> None:
    for _ in range(rng.choice([1, 2, 3])):
        _add_frame(rng, row, merge, VIDEO, row.videos)


def _add_frame(
    rng: random.Random, row: Row, merge: int, token: int, sizes: list[list[int]]
) -> None:
    row.add(START, 1)
    _add_crop(rng, row, merge, token, sizes)
    row.add(END, rng.choice([1, 1, 1, 1, 0]))
    lines = rng.choice([0, 0, 1, 2, 3])
    columns = rng.choice([1, 2, 3])
    for line in range(lines):
        row.add(NEWLINE, (line > 0) * rng.choice([1, 1, 1, 0, 2]))
        # Now and then a line is short, or a slice is not closed.
        for _ in range(columns if rng.random() < 0.8 else rng.randrange(1, 4)):
            row.add(SLICE, 1)
            _add_crop(rng, row, merge, token, sizes)
            row.add(SLICE_END, rng.random() < 0.9)


def _add_crop(rng: random.Random, row: Row, merge: int, token: int, sizes: list[list[int]]) -> None:
    height, width = rng.choice([1, 2, 3, 4, 7]), rng.choice([1, 1, 2, 3, 5])
    sizes.append([height * merge + rng.choice([0, 0, 1]), width * merge])
    row.add(token, height * width, 1 if token == IMAGE else 2)
