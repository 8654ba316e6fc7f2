"""Make small examples in a processor's output format, with random tokens and pixels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mrope.columns import Columns, NewColumns, tower_key
from mrope.positions.custom.minicpm import minicpm_tokens
from mrope.positions.sample_rows import Medium, make_row, medium_tokens
from mrope.spec.spec import MRopeSpec

TEXT_IDS = range(20, 300)


def tiny_examples(
    config: Columns,
    spec: MRopeSpec,
    *,
    images: bool = True,
    videos: bool = True,
    rows: int = 3,
    seed: int = 0,
) -> list[NewColumns]:
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
    config: Columns, spec: MRopeSpec, kinds: list[str], rng: np.random.Generator
) -> NewColumns:
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
        medium = Medium(kind, (grid[0], grid[1], grid[2]), lambda: _text(rng, 2))
        tokens += [*medium_tokens(own, medium), *_text(rng, 2)]
    tokens += _text(rng, int(rng.integers(1, 6)))
    pixels_of = {kind: list(sizes) for kind, sizes in grids.items()}
    if spec.family_row.custom_index == "glm_image":
        # The start of an image that is to be drawn, which has a grid and no pixels.
        tokens += [spec.vision_start_token_id]
        grids["image"].append([1, 2, 3])
    example: NewColumns = dict(make_row(spec, [tokens]))
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if grids[kind]:
            example[tower_key(kind, "grid_thw")] = np.array(grids[kind])
            if in_batch:
                example[tower_key(kind, "merge_sizes")] = np.full(len(grids[kind]), merges[kind])
        if pixels_of[kind]:
            example[pixels] = _pixels(config, spec, pixels_of[kind], rng)
    if spec.tokens_per_second is not None and grids["video"]:
        example["second_per_grid_ts"] = np.array([0.7] * len(grids["video"]), np.float32)
    return example


def _crops_example(
    config: Columns, spec: MRopeSpec, kinds: list[str], rng: np.random.Generator
) -> NewColumns:
    """Return an example of MiniCPM-V: each image and frame is a thumbnail and a line of two slices.

    Pixels are (1, channels, side, side * patches): a batch joins them on the last dimension.
    """
    tokens: list[int] = _text(rng, 4)
    sizes: dict[str, list[list[int]]] = {"image": [], "video": []}
    for kind in kinds:
        token = spec.image_token_id if kind == "image" else spec.video_token_id
        whole, part = (spec.spatial_merge_size * rng.integers(1, 3, (2, 2))).tolist()
        sizes[kind] += [whole, part, part]
        tokens += [*minicpm_tokens(spec, token, [[whole], [part, part]]), *_text(rng, 2)]
    tokens += _text(rng, int(rng.integers(1, 6)))
    example: NewColumns = dict(make_row(spec, [tokens]))
    side = config["vision_config"]["patch_size"]
    for kind, suffix in (("image", ""), ("video", "_videos")):
        if sizes[kind]:
            example[f"target_sizes{suffix}"] = np.array(sizes[kind])
            patches = sum(height * width for height, width in sizes[kind])
            pixels = rng.standard_normal((1, 3, side, side * patches)).astype(np.float32)
            example[f"pixel_values{suffix}"] = pixels
    return example


def _text(rng: np.random.Generator, count: int) -> list[int]:
    ids: list[int] = rng.integers(TEXT_IDS.start, TEXT_IDS.stop, count).tolist()
    return ids


def _pixels(
    config: Columns, spec: MRopeSpec, grids: list[list[int]], rng: np.random.Generator
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
