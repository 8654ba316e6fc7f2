"""Small models with random weights, from the shipped configs, and batches to feed them.

Imports transformers: only tests that need a live model import this module.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForImageTextToText

from mrope import MRopeSpec
from mrope.bench.tiny import tiny_examples as made_up
from mrope.families import FAMILIES

CONFIGS = Path(__file__).parents[1] / "configs"
# Those with a shipped config; aero_realtime has no model in transformers.
MODEL_FAMILIES = tuple(
    name for name in FAMILIES if (CONFIGS / f"{name}.yaml").exists() and name != "aero_realtime"
)


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
    """Return `mrope.bench.tiny.tiny_examples` for a family's shipped config."""
    return made_up(
        model_config(family), tiny_spec(family), images=images, videos=videos, rows=rows, seed=seed
    )
