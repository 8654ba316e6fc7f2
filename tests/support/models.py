"""Small models with random weights, from the shipped configs, and batches to feed them.

Imports transformers: only tests that need a live model import this module.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GlmImageForConditionalGeneration,
)

from mrope import MRopeSpec
from mrope.proof.tiny_examples import tiny_examples as made_up
from mrope.spec.families import FAMILIES, find_family

TINY = Path(__file__).parent / "tiny"
PLAIN = Path(__file__).parent / "plain"
SIZED = Path(__file__).parent / "sized"
EAGER = Path(__file__).parent / "eager"
CONFIGS = Path(__file__).parents[2] / "configs"
# Those with a shipped config, which can be trained and attached; and those that are tested alone.
# aero_realtime has no model in transformers.
MODEL_FAMILIES = tuple(
    name for name in FAMILIES if (CONFIGS / f"{name}.yaml").exists() and name != "aero_realtime"
)
TINY_FAMILIES = tuple(sorted(file.stem for file in TINY.glob("*.yaml")))
LIVE_FAMILIES = (*MODEL_FAMILIES, *TINY_FAMILIES)
# Those whose text has 1-D positions.
PLAIN_FAMILIES = tuple(sorted(file.stem for file in PLAIN.glob("*.yaml")))
# Those whose towers take images one by one, by sizes of their own.
SIZED_FAMILIES = tuple(sorted(file.stem for file in SIZED.glob("*.yaml")))
# Those whose text model runs under eager attention alone.
EAGER_FAMILIES = tuple(sorted(file.stem for file in EAGER.glob("*.yaml")))


def model_config(family: str) -> dict[str, Any]:
    """Return the `model.config` section of the family's YAML file, the caller's to change."""
    return copy.deepcopy(_read_config(family))


@lru_cache
def _read_config(family: str) -> dict[str, Any]:
    files = (folder / f"{family}.yaml" for folder in (TINY, PLAIN, SIZED, EAGER, CONFIGS))
    section: Any = OmegaConf.to_container(OmegaConf.load(next(filter(Path.exists, files))))
    config: dict[str, Any] = section["model"]["config"]
    return config


def tiny_model(family: str, attention: str = "sdpa", seed: int = 0) -> Any:
    """Return a model of `family` in evaluation mode, float32, the same for the same seed."""
    config = dict(model_config(family))
    torch.manual_seed(seed)
    live = AutoConfig.for_model(config.pop("model_type"), **config)
    if family == "glm_image":  # no auto class has it
        model = GlmImageForConditionalGeneration._from_config(live, attn_implementation=attention)
    else:
        model = AutoModelForImageTextToText.from_config(live, attn_implementation=attention)
    return model.eval()


@lru_cache
def tiny_spec(family: str) -> MRopeSpec:
    """Return the spec of `tiny_model`, under the installed transformers' rule."""
    return MRopeSpec.from_config(model_config(family))


def tiny_examples(
    family: str, *, images: bool = True, videos: bool = True, rows: int = 3, seed: int = 0
) -> list[dict[str, Any]]:
    """Return `mrope.bench.tiny_examples.tiny_examples` for a family's shipped config."""
    return made_up(
        model_config(family), tiny_spec(family), images=images, videos=videos, rows=rows, seed=seed
    )


def media_of(family: str) -> list[dict[str, bool]]:
    """Return the media that one batch of the unmodified model can hold: both, where it can."""
    row = find_family(family)
    assert row is not None
    if row.frames_as_images and not row.one_dimensional:
        # transformers 5.23 counts a video's frames among the images, and refuses both together.
        return [{"images": True, "videos": False}, {"images": False, "videos": True}]
    tower = row.tower
    return [{"images": True, "videos": tower is not None and tower.videos}]
