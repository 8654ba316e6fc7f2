"""Every vision tower of the table, live: it reads what is given, and gives the same features."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import numpy as np
import pytest
import torch

from mrope import MRopeError
from mrope.spec.families import FAMILIES, ONE_DIMENSIONAL
from mrope.towers import VisionSpec, vision_tensors

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.vision_utils")

TOWERS = {name: row.tower for name, row in (FAMILIES | ONE_DIMENSIONAL).items()}
# Those of crops take sizes and no grids: see tests/hf/test_crop_forwards.py.
LIVE = [name for name, tower in TOWERS.items() if tower is not None and tower.sizes != "crops"]
# Whichever of these a family's config has is made small.
SMALL = {
    "depth": 2,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "embed_dim": 32,
    "num_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "out_hidden_size": 32,
    "projection_intermediate_size": 32,
    "moe_intermediate_size": 32,
    "adapter_in_dim": 32,
    "adapter_out_dim": 32,
    "layer_types": ["conv", "full_attention"],
    "deepstack_visual_indexes": [0, 1],
    "fullatt_block_indexes": [1],
}
# One row a frame, as GLM's models flatten their videos; the last is smaller than a window.
GRIDS = [[1, 4, 6], [1, 8, 20], [1, 8, 20], [1, 2, 2]]


def live_tower(family: str) -> tuple[Any, VisionSpec]:
    config = transformers.AutoConfig.for_model(family)
    section = config.vision_config
    for name, value in SMALL.items():
        if hasattr(section, name):
            setattr(section, name, value)
    section._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return tower_class(family, section)._from_config(section).eval(), VisionSpec.from_config(config)


def tower_class(family: str, section: Any) -> Any:
    """Return the model whose config is `section`, of the family's module or of the one it is from."""
    borrowed = section.model_type.removesuffix("_encoder").removesuffix("_vision")
    for name in (family.removesuffix("_thinker"), borrowed):
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        for one in vars(module).values():
            if (
                getattr(one, "config_class", None) is type(section)
                and "grid_thw" in inspect.signature(one.forward).parameters
            ):
                return one
    raise AssertionError(f"no tower of {family}")


def pixels(family: str, section: Any) -> torch.Tensor:
    patches = sum(t * h * w for t, h, w in GRIDS)
    side = section.patch_size
    values = 3 * getattr(section, "temporal_patch_size", 1) * side**2
    flat = torch.randn(patches, values, generator=torch.Generator().manual_seed(0))
    return flat.view(1, patches, 3, side, side) if family == "paddleocr_vl" else flat


def merges(tower: Any) -> dict[str, Any]:
    """Return what VideoLLaMA 3's tower takes besides: by how much each image is merged."""
    named = "merge_sizes" in inspect.signature(tower.forward).parameters
    return {"merge_sizes": torch.ones(len(GRIDS), dtype=torch.int64)} if named else {}


def features(tower: Any, given: torch.Tensor, tensors: dict[str, Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        output = tower(given, grid_thw=torch.tensor(GRIDS), **tensors, **merges(tower))
    return [one for one in output.to_tuple() if isinstance(one, torch.Tensor)]


@pytest.mark.parametrize("family", LIVE)
def test_the_tower_gives_the_same_features_and_a_wrong_tensor_would_be_seen(family: str) -> None:
    tower, spec = live_tower(family)
    tensors: dict[str, Any] = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in vision_tensors(spec, GRIDS).items()
    }
    assert set(tensors) == set(spec.keys)
    given = pixels(family, tower.config)
    own = features(tower, given, {})
    assert all(map(torch.equal, features(tower, given, tensors), own))
    for name in spec.keys:
        if name.startswith("max_"):
            continue  # flash attention alone reads it
        wrong = tensors[name][[0, -1]] if name.startswith("cu_") else tensors[name].roll(1, 0)
        changed = features(tower, given, tensors | {name: wrong})
        assert not all(map(torch.equal, changed, own)), name


@pytest.mark.parametrize("family", [name for name, one in TOWERS.items() if one is None])
def test_a_family_without_a_tower_is_refused(family: str) -> None:
    with pytest.raises(MRopeError, match="no vision tower whose tensors mrope computes; known: q"):
        VisionSpec.from_config({"model_type": family, "vision_config": {"spatial_merge_size": 2}})


@pytest.mark.parametrize("family", ONE_DIMENSIONAL)
def test_a_family_with_1d_positions_has_no_rule_in_transformers(family: str) -> None:
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    assert not any(
        "get_rope_index" in vars(one) for one in vars(module).values() if inspect.isclass(one)
    )
