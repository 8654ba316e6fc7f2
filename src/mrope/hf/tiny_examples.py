"""Make small examples in a processor's output format, with random tokens and pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mrope.positions.spans import token_types
from mrope.spec.families import NO_TOKEN
from mrope.spec.spec import MRopeSpec

TEXT_IDS = range(20, 300)


def tiny_examples(
    config: Mapping[str, Any],
    spec: MRopeSpec,
    *,
    images: bool = True,
    videos: bool = True,
    rows: int = 3,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return `rows` examples of mixed lengths, as a processor makes them.

    Every third row has two images and a video, only text, and a video and an image, in this order.
    `images=False` or `videos=False` leaves that kind out.
    """
    rng = np.random.default_rng(seed)
    plans = [["image", "video", "image"], [], ["video", "image"]]
    wanted = {"image": images, "video": videos}
    tower = spec.family_row.tower
    make = _crops_example if tower is not None and tower.sizes == "crops" else _example
    return [
        make(config, spec, [kind for kind in plans[row % 3] if wanted[kind]], rng)
        for row in range(rows)
    ]


def _example(
    config: Mapping[str, Any], spec: MRopeSpec, kinds: list[str], rng: np.random.Generator
) -> dict[str, Any]:
    tokens: list[int] = _text(rng, 4)
    tower = spec.family_row.tower
    in_batch = tower is not None and tower.sizes == "merged_in_batch"
    # The processors of VideoLLaMA 3 merge patches of videos alone.
    merges = {"image": spec.spatial_merge_size, "video": 2 if in_batch else spec.spatial_merge_size}
    grids: dict[str, list[list[int]]] = {"image": [], "video": []}
    for kind in kinds:
        # Three temporal steps, so that first, inner and last frame differ.
        frames = 3 * int(spec.extra.get("temporal_merge_size", 1)) if kind == "video" else 1
        own = replace(spec, spatial_merge_size=merges[kind])
        grid = [frames, *(own.spatial_merge_size * rng.integers(1, 4, 2)).tolist()]
        grids[kind].append(grid)
        tokens += _span_tokens(own, kind, grid, rng)
    tokens += _text(rng, int(rng.integers(1, 6)))
    pixels_of = {kind: list(sizes) for kind, sizes in grids.items()}
    if spec.family_row.custom_index == "glm_image":
        # The start of an image that is to be drawn, which has a grid and no pixels.
        tokens += [spec.vision_start_token_id]
        grids["image"].append([1, 2, 3])
    ids = np.array(tokens)
    types = token_types(spec, ids)
    example: dict[str, Any] = {
        "input_ids": ids,
        # Loss on text only, as in training.
        "labels": np.where(types, -100, ids),
        "mm_token_type_ids": types,
    }
    if spec.family_row.tower is not None and "pairs" in spec.family_row.tower.tensors:
        # ERNIE's experts for images and clips take the markers too.
        example["moe_mm_token_type_ids"] = types | (ids == spec.vision_start_token_id)
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if grids[kind]:
            example[f"{kind}_grid_thw"] = np.array(grids[kind])
            if in_batch:
                example[f"{kind}_merge_sizes"] = np.full(len(grids[kind]), merges[kind])
        if pixels_of[kind]:
            example[pixels] = _pixels(config, spec, pixels_of[kind], rng)
    if spec.tokens_per_second is not None and grids["video"]:
        example["second_per_grid_ts"] = np.array([0.7] * len(grids["video"]), np.float32)
    return example


def _crops_example(
    config: Mapping[str, Any], spec: MRopeSpec, kinds: list[str], rng: np.random.Generator
) -> dict[str, Any]:
    """Return an example of MiniCPM-V: each image and frame is a thumbnail and a line of two slices.

    Pixels are (1, channels, side, side * patches): a batch joins them on the last dimension.
    """
    tokens: list[int] = _text(rng, 4)
    sizes: dict[str, list[list[int]]] = {"image": [], "video": []}
    extra = {name: int(value) for name, value in spec.extra.items()}
    around = (spec.vision_start_token_id, extra["image_end_id"])
    slices = (extra["slice_start_id"], extra["slice_end_id"])
    for kind in kinds:
        token = spec.image_token_id if kind == "image" else spec.video_token_id
        whole, part = (spec.spatial_merge_size * rng.integers(1, 3, (2, 2))).tolist()
        for size, (start, end) in ((whole, around), (part, slices), (part, slices)):
            sizes[kind].append(size)
            tokens += [start, *[token] * spec.frame_tokens(*size), end]
        tokens += _text(rng, 2)
    tokens += _text(rng, int(rng.integers(1, 6)))
    ids = np.array(tokens)
    types = token_types(spec, ids)
    example: dict[str, Any] = {
        "input_ids": ids,
        "labels": np.where(types, -100, ids),
        "mm_token_type_ids": types,
    }
    side = config["vision_config"]["patch_size"]
    for kind, suffix in (("image", ""), ("video", "_videos")):
        if sizes[kind]:
            example[f"target_sizes{suffix}"] = np.array(sizes[kind])
            patches = sum(height * width for height, width in sizes[kind])
            pixels = rng.standard_normal((1, 3, side, side * patches)).astype(np.float32)
            example[f"pixel_values{suffix}"] = pixels
    return example


def _span_tokens(
    spec: MRopeSpec, kind: str, grid: list[int], rng: np.random.Generator
) -> list[int]:
    """Return the tokens of an image or a video, with two text tokens after each span."""
    t, h, w = grid
    apart = kind == "video" and spec.family_row.frames_apart
    as_image = kind == "image" or spec.family_row.frames_as_images
    placeholder = spec.image_token_id if as_image else spec.video_token_id
    shared = int(spec.extra.get("temporal_merge_size", 1)) if kind == "video" else 1
    start = [] if spec.vision_start_token_id == NO_TOKEN else [spec.vision_start_token_id]
    tokens: list[int] = []
    # Frames with newline tokens stand side by side.
    apart = apart and not spec.family_row.newlines
    end, wrapper = [], 0
    if spec.family_row.custom_index == "glm_image":
        end = [int(spec.extra["image_end_token_id"])]
    if spec.family_row.custom_index == "hunyuan":
        # A newline behind each line, one placeholder in front of the image and one behind.
        wrapper = h // spec.spatial_merge_size + 2
    for _ in range(t if apart else 1):
        size = (1 if apart else t // shared) * spec.frame_tokens(h, w) + wrapper
        tokens += [*start, *[placeholder] * size, *end, *_text(rng, 2)]
    if kind == "video" and spec.family_row.frames_as_images:
        markers = spec.extra["video_start_token_id"], spec.extra["video_end_token_id"]
        tokens = [int(markers[0]), *tokens, int(markers[1])]
    return tokens


def _text(rng: np.random.Generator, count: int) -> list[int]:
    ids: list[int] = rng.integers(TEXT_IDS.start, TEXT_IDS.stop, count).tolist()
    return ids


def _pixels(
    config: Mapping[str, Any], spec: MRopeSpec, grids: list[list[int]], rng: np.random.Generator
) -> Any:
    vision = config["vision_config"]
    side = vision.get("patch_size", 14)
    patches = sum(t * h * w for t, h, w in grids)
    tower = spec.family_row.tower
    if tower is not None and tower.patch == "image":
        # PaddleOCR-VL's processor does not flatten patches.
        return rng.standard_normal((patches, 3, side, side)).astype(np.float32)
    size = 3 * vision.get("temporal_patch_size", 1) * side**2
    return rng.standard_normal((patches, size)).astype(np.float32)
