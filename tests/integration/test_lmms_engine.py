"""lmms-engine on the CPU, started by its own launcher with its own YAML.

It requires transformers below 5.9, so that it has an environment of its own: `make peers`. What of
it runs only on a GPU is replaced here: two functions of flash_attn and a loss and a layer norm of
Liger's, each by a line or two of torch; its device mesh, by one on the CPU; and its questions about
the GPU's memory and name. Attention is its own, by its "sdpa" backend.
"""

from __future__ import annotations

import importlib
import json
import pickle
import runpy
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional

from integration.common import BATCH, STEPS, TEXT_PROCESSOR, import_lmms_engine, rows
from integration.lmms_recipe import KINDS, save, write_recipe
from mrope import MRopeCollator, MRopeError, MRopeSpec
from mrope.collate.padding import PaddingCollator
from support.models import model_config, tiny_examples, tiny_model

# Its own imports' calls of what others deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")

RULE = "transformers-4.57"
LAUNCHER = "mrope.transforms.lmms_engine"


@pytest.fixture
def engine() -> Callable[[str], Any]:
    """Return a function that imports a module of lmms-engine."""
    return import_lmms_engine()


# Its rope functions -------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "family,function",
    [("qwen3_vl", "qwen3_vl_get_rope_index"), ("qwen2_5_vl", "qwen2_5_vl_rope_index")],
)
@pytest.mark.parametrize("seed", range(5))
def test_its_rope_functions_agree(
    engine: Any, family: str, function: str, side: Any, seed: int
) -> None:
    own = getattr(engine("models.common_ops.rope"), function)
    spec = MRopeSpec.from_config(model_config(family), RULE)
    examples = tiny_examples(family, rows=6, seed=seed)
    batch = MRopeCollator(PaddingCollator(padding_side=side), spec)(examples)
    names = ("input_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    arguments = {name: batch[name] for name in names}
    if "second_per_grid_ts" in batch:
        arguments["second_per_grid_ts"] = batch["second_per_grid_ts"]
    wanted = own(SimpleNamespace(config=tiny_model(family).config), **arguments)
    for found, expected in zip((batch["position_ids"], batch["rope_deltas"]), wanted, strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


# Its models ---------------------------------------------------------------------------------------


def plain_aero(engine: Any) -> Any:
    aero = engine("models.aero_realtime")
    own = dict(model_config("qwen3_vl"))
    audio = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = aero.AeroRealtimeConfig(
        text_config=own["text_config"],
        vision_config=own["vision_config"],
        audio_config=aero.AeroRealtimeAudioEncoderConfig(**audio, num_attention_heads=2),
        image_token_index=own["image_token_id"],
        video_token_index=own["video_token_id"],
        vision_start_token_index=own["vision_start_token_id"],
    )
    torch.manual_seed(0)
    model = aero.AeroRealtimeForConditionalGeneration
    return model._from_config(config, attn_implementation="sdpa").train()


def pad_free(engine: Any, model: Any) -> Any:
    engine("models.aero_realtime.monkey_patch").apply_rmpad_to_aero_realtime(model)
    return model


class _Loss:
    """What Liger's fused loss computes, in torch."""

    def __init__(self, reduction: str) -> None:
        self.reduction = reduction

    def __call__(self, weight: Any, hidden: Any, labels: Any) -> torch.Tensor:
        return functional.cross_entropy(hidden @ weight.T, labels, reduction=self.reduction)


@pytest.fixture
def own_calls(engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stand in for GPU code, undo the patched classes, and count calls of the rope function."""
    calls, rope = [0], engine("models.common_ops.rope").qwen3_vl_get_rope_index

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return rope(*args, **kwargs)

    stand_ins = {
        "index_first_axis": lambda rows, indices: rows[indices],
        "rearrange": importlib.import_module("einops").rearrange,
        "LigerFusedLinearCrossEntropyLoss": _Loss,
        "_HAS_LIGER": True,
        "_patch_layer_norm_module": lambda *_, **__: None,
        "qwen3_vl_get_rope_index": counted,
    }
    names = ("qwen3_vl.qwen3_vl_ops", "qwen3_vl.qwen3_vl_liger", "qwen3_vl.monkey_patch")
    for name in (*names, "aero_realtime.aero_realtime_liger"):
        for attribute, value in stand_ins.items():
            monkeypatch.setattr(engine(f"models.{name}"), attribute, value, raising=False)
    live = importlib.import_module("transformers.models.qwen3_vl.modeling_qwen3_vl")
    aero = engine("models.aero_realtime.modeling_aero_realtime")
    for module in (live, aero):
        for cls in vars(module).values():
            if isinstance(cls, type) and issubclass(cls, torch.nn.Module):
                monkeypatch.setattr(cls, "forward", cls.forward)
    return calls


def tensors(count: int) -> list[dict[str, Any]]:
    """Return rows as its processors make them."""
    return [
        {name: torch.as_tensor(x) for name, x in row.items() if name != "mm_token_type_ids"}
        for row in rows("qwen3_vl", count=count)
    ]


def test_the_plain_aero_forward_needs_positions(engine: Any, own_calls: list[int]) -> None:
    """Left to itself it numbers tokens one by one; only its padding-free forward knows more."""
    model = plain_aero(engine).eval()
    spec = MRopeSpec.from_config(model.config.to_dict(), RULE)
    collate = MRopeCollator(engine("datasets.collator").VisionCollator(TEXT_PROCESSOR), spec)
    batch = dict(collate(tensors(BATCH)))
    without = {name: value for name, value in batch.items() if name != "position_ids"}
    with torch.no_grad():
        alone, given = model(**without).loss, model(**batch).loss
        assert own_calls == [0]
        pad_free(engine, model)
        wanted = model(**without).loss
    assert own_calls == [1]
    torch.testing.assert_close(given, wanted, rtol=0, atol=1e-5)
    assert (alone - wanted).abs() > 1e-4


# Its YAML -----------------------------------------------------------------------------------------


@pytest.fixture
def on_the_cpu(
    own_calls: list[int], engine: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[int]]:
    """Let its launcher and its Trainer run without a GPU; count calls of the rope function."""
    # What torchrun sets; by itself the launcher would take a fixed port.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 1}
    for name, value in {**settings, "RANK": 0, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    mesh = lambda _, *args, **options: init_device_mesh("cpu", *args, **options)  # noqa: E731
    monkeypatch.setattr(engine("parallel.process_group_manager"), "init_device_mesh", mesh)
    barrier = dist.barrier
    monkeypatch.setattr(dist, "barrier", lambda *_, **__: barrier())
    tools = engine("utils.train_utils").TrainUtilities
    monkeypatch.setattr(tools, "get_device_tdp", staticmethod(lambda: 0))
    for name in ("synchronize", "get_device_name", "max_memory_allocated", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    # Its runner reads this after training; its arguments have no such field.
    arguments = engine("train").TrainingArguments
    monkeypatch.setattr(arguments, "only_save_mm_adapter", False, raising=False)
    yield own_calls
    if dist.is_initialized():
        dist.destroy_process_group()


def launch(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `python -m mrope.transforms.lmms_engine config_yaml=FILE` in this process."""
    # hydra writes its log into the working directory.
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr(sys, "argv", [LAUNCHER, f"config_yaml={file}"])
    runpy.run_module(LAUNCHER, run_name="__main__")


def losses(recipe: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Train by a recipe, and read the losses from the state that its Trainer saves."""
    recipe["trainer_args"]["output_dir"] = str(folder / "out")
    folder.mkdir()
    launch(save(recipe, folder / "train.yaml"), monkeypatch)
    state = json.loads((folder / "out" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize("family", KINDS)
def test_equal_losses(
    on_the_cpu: list[int], family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, family)
    off = losses(recipe, tmp_path / "off", monkeypatch)
    assert on_the_cpu == [STEPS] and len(set(off)) == len(off) == STEPS
    recipe["dataset_config"]["dataset_type"] = f"mrope_{KINDS[family]}"
    assert losses(recipe, tmp_path / "on", monkeypatch) == off
    assert on_the_cpu == [STEPS]


def dataset(recipe: dict[str, Any], **options: Any) -> Any:
    """Return the recipe's dataset with the stage, not built yet."""
    importlib.import_module(LAUNCHER)
    from lmms_engine.datasets import DatasetConfig
    from lmms_engine.mapping_func import DATASET_MAPPING

    section = {**recipe["dataset_config"], "extra_kwargs": {"mrope": options}}
    return DATASET_MAPPING[f"mrope_{section['dataset_type']}"](DatasetConfig(**section))


@pytest.fixture
def recipe(engine: Any, tmp_path: Path) -> dict[str, Any]:
    return write_recipe(tmp_path, "qwen3_vl")


@pytest.mark.parametrize(
    "options,message",
    [
        ({"referense": RULE}, r"extra_kwargs\.mrope: unknown option 'referense' .*'reference'"),
        ({"packing": "flatten"}, "unknown option 'packing'; known: model, reference, on_error"),
        ({"model": {"model_type": "qwen9_vl"}}, "unknown model_type 'qwen9_vl'"),
        ({"reference": "transformers-9"}, "transformers-9"),
        ({"on_error": "ignore"}, "on_error must be one of 'raise', 'skip'"),
        ({"max_rejects": 3}, "max_rejects belongs to on_error='skip'"),
    ],
)
def test_wrong_options_are_refused_before_data_is_loaded(
    recipe: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        dataset(recipe, **options)


def test_the_section_must_be_a_mapping(recipe: dict[str, Any]) -> None:
    module = importlib.import_module(LAUNCHER)
    with pytest.raises(MRopeError, match=r"mrope must be a mapping, not list"):
        module.Options.read(["skip"])


def test_the_model_may_be_given_apart_from_the_processor(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "processor" / "config.json"
    moved = file.rename(tmp_path / "config.json")
    with pytest.raises(MRopeError, match=r"no model config at .*mrope\.model"):
        dataset(recipe)
    config = json.loads(moved.read_text())
    wanted = MRopeSpec.from_config(config, RULE)
    assert dataset(recipe, model=config).mrope_spec == wanted
    assert dataset(recipe, model=str(moved)).mrope_spec == wanted


def test_bad_examples_are_skipped(recipe: dict[str, Any], tmp_path: Path) -> None:
    made = dataset(recipe, on_error="skip", rejects=str(tmp_path / "bad" / "rejects.jsonl"))
    made.config.shuffle = False
    made.build()
    good, other = made[1], made[2]
    # No placeholder is left for its picture.
    bad = {**good, "input_ids": good["input_ids"].masked_fill(good["input_ids"] == 5, 7)}
    collate = made.get_collator()
    with pytest.warns(UserWarning, match="example"):
        batch = collate([good, bad, other])
    assert torch.equal(batch["position_ids"], collate([good, other])["position_ids"])
    assert len(list((tmp_path / "bad").iterdir())) == 1


def test_packed_items_are_lists_of_examples(recipe: dict[str, Any]) -> None:
    recipe["dataset_config"] |= {"packing": True, "packing_strategy": "first_fit"}
    made = dataset(recipe)
    made.build()
    item = made[0]
    assert isinstance(item, list) and len(item) > 1
    batch, wanted = made.get_collator()([item]), made.get_collator()(item)
    assert torch.equal(batch["position_ids"], wanted["position_ids"])


def test_spawned_workers_can_unpickle_the_dataset(recipe: dict[str, Any]) -> None:
    made = dataset(recipe)
    again = pickle.loads(pickle.dumps(made))
    assert type(again) is type(made) and again.mrope_spec == made.mrope_spec


def test_datasets_registered_later_can_be_added(engine: Any) -> None:
    module = importlib.import_module(LAUNCHER)
    registry = engine("mapping_func").DATASET_MAPPING
    assert module.register_datasets() == []
    registry["later"] = type("Later", (registry["qwen3_vl"],), {})
    try:
        assert module.register_datasets() == ["mrope_later"]
    finally:
        registry.pop("later")
        registry.pop("mrope_later")
