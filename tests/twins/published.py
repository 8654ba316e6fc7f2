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


def centred(spec: MRopeSpec, tokens: list[int], media: dict[int, Iterator[Grid]]) -> Numbers:
    """Number as Ming's `get_t_scale_rope_index`, and SGLang's for `bailing_moe_v3_vl`.

    Time goes on by 2 from frame to frame; rows and columns lie around it. What follows is 1 behind
    the largest time.
    """
    merge = spec.spatial_merge_size
    if spec.family_row.frames_apart:
        media = {token: split_frames(grids) for token, grids in media.items()}
    numbers: Numbers = []
    while len(numbers) < len(tokens):
        start = 1 + max((number[0] for number in numbers), default=-1)
        if tokens[len(numbers)] not in media:
            numbers.append((start, start, start))
            continue
        frames, height, width = next(media[tokens[len(numbers)]])
        high, wide = height // merge, width // merge
        for time in range(start, start + 2 * frames, 2):
            for y in range(high):
                for x in range(wide):
                    numbers.append((time, time + y - (high - 1) // 2, time + x - (wide - 1) // 2))
    return numbers


def planes(spec: MRopeSpec, tokens: list[int], media: dict[int, Iterator[Grid]]) -> Numbers:
    """Number as NEO's `get_thw_indexes`: each token that is no image's, and each first token of an
    image behind its start marker, moves time on; only an image has rows and columns."""
    numbers: Numbers = []
    time = -1
    while len(numbers) < len(tokens):
        token = tokens[len(numbers)]
        if token not in media:
            time += 1
            numbers.append((time, 0, 0))
            continue
        time += numbers != [] and tokens[len(numbers) - 1] == spec.vision_start_token_id
        numbers += block(spec, next(media[token]), (time, 0, 0))
    return numbers


def around_the_middle(
    spec: MRopeSpec, tokens: list[int], media: dict[int, Iterator[Grid]]
) -> list[tuple[int, ...]]:
    """Number as HunyuanImage-3.0's `build_2d_rope`, whose float32 grids are cut to integers."""
    numbers: list[tuple[int, ...]] = []
    while len(numbers) < len(tokens):
        own = len(numbers)
        if tokens[own] not in media:
            numbers.append((own, own))
            continue
        _, height, width = next(media[tokens[own]])
        top, left = own + (width * height - height) / 2, own + (width * height - width) / 2
        numbers += [(int(top + y), int(left + x)) for y in range(height) for x in range(width)]
    return numbers


PUBLISHED: dict[str, Callable[[MRopeSpec, list[int], dict[int, Any]], Any]] = {
    "KeyeVL": grids_as_blocks,
    "KeyeVL1_5": grids_as_blocks,
    "openpangu_vl": clips_with_markers,
    "bailing_moe_v3_vl@vllm": grids_as_blocks,
    "bailing_moe_v3_vl@sglang": centred,
    "bailingmm_moe_v2_lite@ming": centred,
    "bailingmm_moe_v2_lite@vllm_omni": grids_as_blocks,
    "colqwen3": grids_as_blocks,
    "ops_colqwen3": grids_as_blocks,
    "qwen3_vl_nemotron_embed": grids_as_blocks,
    "interns1_pro": grids_as_blocks,
    "neo_chat": planes,
    "hunyuan_image_3_moe": around_the_middle,
    "intern_s2_preview": grids_as_blocks,
    "interns2_mobius": grids_as_blocks,
    "isaac": events,
}
