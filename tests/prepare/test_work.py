"""The work model: its counts against torch's counter of operations, on small live models."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from mrope import MRopeError
from mrope.prepare.work import WorkModel
from support.models import model_config, tiny_model

CONFIG_2B = Path(__file__).parents[2] / "configs" / "bench" / "models" / "2b.json"
IMAGES = [[1, 16, 24], [1, 20, 20], [1, 4, 8]]


def counted(family: str, grids: list[list[int]], text: int) -> tuple[dict[Any, int], int]:
    """Return the operations of a training step by torch operator, and the tokens of its row."""
    config = model_config(family)
    # Plain products, which the counter sees on a CPU: in attention, and expert by expert.
    model = tiny_model(family, attention="eager").train()
    model.config._experts_implementation = "eager"
    model.config.text_config._experts_implementation = "eager"
    vision = config["vision_config"]
    values = 3 * vision.get("temporal_patch_size", 2) * vision["patch_size"] ** 2
    ids = [10] * text
    for _, height, width in grids:
        merged = height * width // vision["spatial_merge_size"] ** 2
        ids += [config.get("vision_start_token_id", 9), *[config["image_token_id"]] * merged, 9]
    input_ids = torch.tensor([ids])
    batch: dict[str, Any] = {"input_ids": input_ids, "labels": input_ids}
    batch["mm_token_type_ids"] = (input_ids == config["image_token_id"]).int()
    if grids:
        batch["image_grid_thw"] = torch.tensor(grids)
        batch["pixel_values"] = torch.randn(int(batch["image_grid_thw"].prod(1).sum()), values)
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    return counter.get_flop_counts()["Global"], len(ids)


def eager(family: str) -> WorkModel:
    """Return the model's work with eager attention, which computes scores of later tokens too."""
    work = WorkModel.from_config(model_config(family))
    return replace(work, per_token_pair=2 * work.per_token_pair)


@pytest.mark.parametrize(
    "family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm4v_moe"]
)
def test_counts_are_those_of_torch(family: str) -> None:
    operations, tokens = counted(family, IMAGES, text=100)
    areas = [height * width for _, height, width in IMAGES]
    found = eager(family)([tokens], [sum(areas)], [sum(area**2 for area in areas)])
    assert found[0] == pytest.approx(sum(operations.values()), rel=0.02)


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_linear_attention_is_counted_in_chunks(family: str) -> None:
    operations, tokens = counted(family, [], text=640)
    # The counter takes the backward pass of a convolution of single channels for one of all.
    operations.pop(torch.ops.aten.convolution_backward)
    found = eager(family).text([tokens])
    assert found[0] == pytest.approx(sum(operations.values()), rel=0.05)


@pytest.mark.parametrize("form", [str, Path, lambda path: json.loads(path.read_text())])
def test_a_config_is_read_in_any_form(form: Any) -> None:
    work = WorkModel.from_config(form(CONFIG_2B))
    # 6 operations for each of the 1.41e9 weights of the layers and the 0.31e9 of the LM head.
    assert work.per_token == pytest.approx(6 * 1.72e9, rel=0.01)
    assert "WorkModel: 10.3 GFLOP a token" in str(work)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl_moe", "qwen3_5_moe", "glm4v_moe"])
def test_a_live_config_is_read(family: str) -> None:
    section = dict(model_config(family))
    live = AutoConfig.for_model(section.pop("model_type"), **section)
    assert WorkModel.from_config(live) == WorkModel.from_config(model_config(family))


def test_a_frozen_tower_has_no_backward_pass() -> None:
    whole, frozen = (WorkModel.from_config(CONFIG_2B, frozen_tower=one) for one in (False, True))
    assert frozen.per_patch_pair == whole.per_patch_pair / 3
    assert whole.per_patch / 3 < frozen.per_patch < whole.per_patch / 2.9
    assert frozen.text([5]) == whole.text([5])


def test_work_is_the_sum_of_both_parts() -> None:
    work = pickle.loads(pickle.dumps(WorkModel.from_config(CONFIG_2B)))
    found = work([10, 2000], [0, 4096], [0, 4 * 1024**2])
    assert found.tolist() == (work.text([10, 2000]) + work.tower([0, 4096], [0, 2**22])).tolist()
    assert work([10, 2000], [0, 4096]).tolist() == found.tolist()  # images of 1,024 patches
    assert work([2000], [4096], [4096**2])[0] > 1.1 * found[1]  # one image


def test_a_tower_that_is_not_known_is_named() -> None:
    with pytest.raises(MRopeError, match=r"vision tower of 'ernie4_5_vl_moe'.* Known: qwen2_vl, "):
        WorkModel.from_config(model_config("ernie4_5_vl_moe"))
    with pytest.raises(MRopeError, match="the config has no hidden_size"):
        WorkModel.from_config({"model_type": "qwen3_vl", "text_config": {}, "vision_config": {}})
