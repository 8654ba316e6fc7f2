"""Small models with random weights, from the shipped configs, and batches to feed them.

Imports transformers: only tests that need a live model import this module.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForImageTextToText

from mrope import MRopeSpec
from mrope.families import FAMILIES

CONFIGS = Path(__file__).parents[1] / "configs"
MODEL_FAMILIES = tuple(name for name in FAMILIES if name != "aero_realtime")
TEXT_IDS = range(20, 300)


def model_config(family: str) -> dict[str, Any]:
    """Return the `model.config` section of `configs/<family>.yaml`."""
    section: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{family}.yaml"))
    config: dict[str, Any] = section["model"]["config"]
    return config


def tiny_model(family: str, attention: str = "sdpa", seed: int = 0) -> Any:
    """Return a model of `family` in evaluation mode, float32, the same for the same seed."""
    config = dict(model_config(family))
    torch.manual_seed(seed)
    live = AutoConfig.for_model(config.pop("model_type"), **config)
    model = AutoModelForImageTextToText.from_config(live, attn_implementation=attention)
    return model.eval()


@lru_cache
def tiny_spec(family: str) -> MRopeSpec:
    """Return the spec of `tiny_model`, under the installed transformers' rule."""
    return MRopeSpec.from_config(model_config(family))


def tiny_examples(
    family: str, *, images: bool = True, videos: bool = True, rows: int = 3, seed: int = 0
) -> list[dict[str, Any]]:
    """Return examples of unequal length as a processor makes them.

    Row 0 has two images and a clip, row 1 text alone, row 2 a clip and an image; each only where
    asked for.
    """
    rng = np.random.default_rng(seed)
    plans = [["image", "video", "image"], [], ["video", "image"]]
    wanted = {"image": images, "video": videos}
    return [
        _example(family, [kind for kind in plans[row % 3] if wanted[kind]], rng)
        for row in range(rows)
    ]


def _example(family: str, kinds: list[str], rng: np.random.Generator) -> dict[str, Any]:
    spec = tiny_spec(family)
    tokens: list[int] = _text(rng, 4)
    grids: dict[str, list[list[int]]] = {"image": [], "video": []}
    for kind in kinds:
        grid = [3 if kind == "video" else 1, *(2 * rng.integers(1, 4, 2)).tolist()]
        grids[kind].append(grid)
        apart = kind == "video" and spec.traits.frames_apart
        frames = [[1, *grid[1:]]] * grid[0] if apart else [grid]
        placeholder = spec.image_token_id if kind == "image" else spec.video_token_id
        for t, h, w in frames:
            tokens += [spec.vision_start_token_id, *[placeholder] * (t * h * w // 4)]
            tokens += _text(rng, 2)
    tokens += _text(rng, int(rng.integers(1, 6)))
    ids = np.array(tokens)
    example: dict[str, Any] = {
        "input_ids": ids,
        "labels": np.where(np.isin(ids, [spec.image_token_id, spec.video_token_id]), -100, ids),
        "mm_token_type_ids": (ids == spec.image_token_id) + 2 * (ids == spec.video_token_id),
    }
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if grids[kind]:
            example[f"{kind}_grid_thw"] = np.array(grids[kind])
            example[pixels] = _pixels(family, grids[kind], rng)
    if spec.tokens_per_second is not None and grids["video"]:
        example["second_per_grid_ts"] = np.array([0.7] * len(grids["video"]), np.float32)
    return example


def _text(rng: np.random.Generator, count: int) -> list[int]:
    ids: list[int] = rng.integers(TEXT_IDS.start, TEXT_IDS.stop, count).tolist()
    return ids


def _pixels(family: str, grids: list[list[int]], rng: np.random.Generator) -> Any:
    vision = model_config(family)["vision_config"]
    size = 3 * vision.get("temporal_patch_size", 2) * vision.get("patch_size", 14) ** 2
    patches = sum(t * h * w for t, h, w in grids)
    return rng.standard_normal((patches, size)).astype(np.float32)
