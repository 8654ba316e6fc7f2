"""Calls the `get_rope_index` of whatever transformers is installed, on an object with a config alone."""

from __future__ import annotations

import importlib
import types
from typing import Any

import numpy as np
import torch
import transformers

from mrope import MRopeSpec
from mrope.families import resolve_reference

# The model class whose function numbers each family; aero_realtime and, where a release does not
# know it yet, qwen3_5 are numbered by Qwen3-VL's, as lmms-engine does.
_CLASSES = {
    "qwen2_vl": "Qwen2VLModel",
    "qwen2_5_vl": "Qwen2_5_VLModel",
    "qwen3_vl": "Qwen3VLModel",
    "qwen3_vl_moe": "Qwen3VLMoeModel",
    "qwen3_5": "Qwen3_5Model",
    "qwen3_5_moe": "Qwen3_5MoeModel",
}


def installed_reference() -> str:
    """Return the reference that the installed transformers is."""
    return resolve_reference("auto", transformers.__version__)


def peer_class(family: str) -> Any:
    """Return transformers' own model class for `family`."""
    name = family if family in _CLASSES else "qwen3_vl"
    path = f"transformers.models.{name}.modeling_{name}"
    if importlib.util.find_spec(f"transformers.models.{name}") is None:
        name, path = "qwen3_vl", "transformers.models.qwen3_vl.modeling_qwen3_vl"
    return getattr(importlib.import_module(path), _CLASSES[name])


def peer_rope_index(spec: MRopeSpec, batch: dict[str, Any]) -> tuple[Any, Any]:
    """Return the numpy arrays that transformers computes for arguments of `rope_index`."""
    model = peer_class(spec.family)
    holder = types.SimpleNamespace(
        config=types.SimpleNamespace(
            image_token_id=spec.image_token_id,
            video_token_id=spec.video_token_id,
            vision_start_token_id=spec.vision_start_token_id,
            vision_config=types.SimpleNamespace(
                spatial_merge_size=spec.spatial_merge_size,
                tokens_per_second=spec.tokens_per_second,
            ),
        )
    )
    if hasattr(model, "get_vision_position_ids"):
        holder.get_vision_position_ids = types.MethodType(model.get_vision_position_ids, holder)
    arguments = {name: _torch(value) for name, value in batch.items()}
    if installed_reference() == "transformers-4.57":
        del arguments["mm_token_type_ids"]
    if spec.tokens_per_second is None:
        del arguments["second_per_grid_ts"]
    position_ids, rope_deltas = model.get_rope_index(holder, **arguments)
    return position_ids.numpy(), rope_deltas.numpy()


def _torch(value: Any) -> Any:
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
