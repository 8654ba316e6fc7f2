"""Slow twins of rules that are published outside of transformers: one token after another.

Each is written from the rule of the project that `Family.source` names, in our own words, for one row
without padding. vLLM's functions compute the position ids of one prompt; what they have at padding, and
rope deltas of padded rows, is a convention of the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from mrope import MRopeSpec

Grid = tuple[int, int, int]
Numbers = list[tuple[int, int, int]]


def grids_as_blocks(
    spec: MRopeSpec, tokens: list[int], media: dict[int, Iterator[Grid]]
) -> Numbers:
    """Number as vLLM's Keye-VL and Bailing MoE V3 VL: each frame is an image, whatever its clip.

    SGLang's Intern-S2-Mobius, and vLLM's Intern-S2 as a model derived from Qwen3.5, do the same. A
    block starts 1 after the largest position of what stands before it, and so does text.
    """
    frames = {token: split_frames(grids) for token, grids in media.items()}
    numbers: Numbers = []
    while len(numbers) < len(tokens):
        start = 1 + max(map(max, numbers), default=-1)
        token = tokens[len(numbers)]
        if token in frames:
            numbers += block(spec, next(frames[token]), (start, start, start))
        else:
            numbers.append((start, start, start))
    return numbers


def clips_with_markers(
    spec: MRopeSpec, tokens: list[int], media: dict[int, Iterator[Grid]]
) -> Numbers:
    """Number as vLLM's openPangu-VL: a clip at once, an end and a start marker between its frames.

    Frames are max(height, width) apart, and each marker takes 1.
    """
    numbers: Numbers = []
    while len(numbers) < len(tokens):
        start = 1 + max(map(max, numbers), default=-1)
        token = tokens[len(numbers)]
        if token not in media:
            numbers.append((start, start, start))
            continue
        frames, height, width = next(media[token])
        side = max(height, width) // spec.spatial_merge_size
        for frame in range(frames):
            if frame:
                assert not {tokens[len(numbers)], tokens[len(numbers) + 1]} & set(media)
                numbers += [(start, start, start), (start + 1, start + 1, start + 1)]
                start += 2
            numbers += block(spec, (1, height, width), (start, start, start))
            start += side
    return numbers


def events(spec: MRopeSpec, tokens: list[int], media: dict[int, Iterator[Grid]]) -> Numbers:
    """Number as Perceptron's `modular_isaac.py`: a clock that an image moves on by its one frame.

    Text has the clock's time on every axis; an image has it on the first, and counts rows and
    columns from 0. (vLLM's `isaac.py` numbers text between two images otherwise: after the largest
    position of the first.)
    """
    numbers: Numbers = []
    clock = 0
    while len(numbers) < len(tokens):
        token = tokens[len(numbers)]
        if token in media:
            numbers += block(spec, next(media[token]), (clock, 0, 0))
        else:
            numbers.append((clock, clock, clock))
        clock += 1
    return numbers


def block(spec: MRopeSpec, grid: Grid, origin: tuple[int, int, int]) -> Numbers:
    """Return the position ids of one frame, row by row, counted from `origin`."""
    frames, height, width = grid
    assert frames == 1
    merge = spec.spatial_merge_size
    first, top, left = origin
    return [
        (first, top + y, left + x) for y in range(height // merge) for x in range(width // merge)
    ]


def split_frames(grids: Iterator[Grid]) -> Iterator[Grid]:
    """Yield a grid of one frame for each frame, as vLLM's Keye-VL splits its clips."""
    for frames, height, width in grids:
        yield from [(1, height, width)] * frames


PUBLISHED: dict[str, Callable[[MRopeSpec, list[int], dict[int, Any]], Numbers]] = {
    "KeyeVL": grids_as_blocks,
    "KeyeVL1_5": grids_as_blocks,
    "openpangu_vl": clips_with_markers,
    "bailing_moe_v3_vl": grids_as_blocks,
    "intern_s2_preview": grids_as_blocks,
    "interns2_mobius": grids_as_blocks,
    "isaac": events,
}
