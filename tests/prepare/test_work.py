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
from transformers import AutoConfig, AutoModelForImageTextToText

from mrope import MRopeError
from mrope.prepare.work import _TOWERS, WorkModel
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


# Windows, experts, and GLM's tower; the linear maps of all families are counted below.
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl_moe", "glm4v_moe"])
def test_counts_are_those_of_torch(family: str) -> None:
    operations, tokens = counted(family, IMAGES, text=100)
    areas = [height * width for _, height, width in IMAGES]
    found = eager(family)([tokens], [sum(areas)], [sum(area**2 for area in areas)])
    assert found[0] == pytest.approx(sum(operations.values()), rel=0.02)


@pytest.mark.parametrize("family", ["qwen3_5_moe"])
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


@pytest.mark.parametrize("family", _TOWERS)
def test_keys_at_their_default_can_be_left_out(family: str) -> None:
    """transformers before 4.57 saved only what differs from the class's default."""
    live = AutoConfig.for_model(family)
    assert WorkModel.from_config({"model_type": family}) == WorkModel.from_config(live)
    # Older files of Qwen2-VL hold the text model's values beside the sections.
    flat = {"model_type": family, "hidden_size": 1024, "num_hidden_layers": 8}
    nested = {"model_type": family, "text_config": {"hidden_size": 1024, "num_hidden_layers": 8}}
    assert WorkModel.from_config(flat) == WorkModel.from_config(nested)
    assert WorkModel.from_config(flat).per_token < WorkModel.from_config(live).per_token


@pytest.mark.parametrize("family", _TOWERS)
def test_released_weights_are_counted(family: str) -> None:
    """The linear maps of each class's default config, by its parameters on the meta device."""
    config = AutoConfig.for_model(family)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    text, merge = config.text_config, config.vision_config.spatial_merge_size
    experts = getattr(text, "n_routed_experts", 0) or getattr(text, "num_experts", 0)
    # Of the weights in a module of this name, the share that a token or a patch meets.
    share = {"experts": text.num_experts_per_tok / experts} if experts else {}
    share |= {"merger": merge**-2, "deepstack_merger_list": merge**-2, "downsample": merge**-2}
    share |= dict.fromkeys(("embed_tokens", "pos_embed", "embeddings", "conv1d"), 0)
    counts = {"patch_embed": 0.0, "visual": 0.0, "model": 0.0, "lm_head": 0.0}
    for name, weights in model.named_parameters():
        parts = name.removeprefix("model.").split(".")
        kind = next((kind for kind in counts if kind in parts), "model")
        meets = next((share[part] for part in parts if part in share), 1)
        counts[kind] += weights.numel() * meets * (weights.ndim > 1)
    work = WorkModel.from_config(config)
    # Linear attention has products of its own, and pixels need no gradient.
    text_work = 6 * (counts["model"] + counts["lm_head"])
    assert work.per_token == pytest.approx(text_work, rel=0.03 if "qwen3_5" in family else 1e-6)
    assert work.per_patch == pytest.approx(6 * counts["visual"] + 4 * counts["patch_embed"])


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
    with pytest.raises(MRopeError, match="hidden_size must be an integer >= 0, not 'big'"):
        WorkModel.from_config({"model_type": "qwen3_vl", "text_config": {"hidden_size": "big"}})
