"""LLaMA-Factory's `run_exp`, its own and ours, in an environment of its own: make peers."""

from __future__ import annotations

import importlib
import importlib.util
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from integration.on_cpu import replace_torchaudio
from integration.trainer_main import ARGUMENTS, compare
from mrope.errors import MRopeError
from support.saved import save_model, save_rows

if importlib.util.find_spec("llamafactory") is None:
    pytest.skip("LLaMA-Factory is not installed: make peers", allow_module_level=True)

THEIRS, OURS = "llamafactory.train.tuner", "mrope.transforms.llama_factory"
COLUMNS = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages", "images": "images"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
    },
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("llama-factory")
    _, rows = save_rows(folder / "rows")
    table = {"rows": {"file_name": rows.name, **COLUMNS}}
    (rows.parent / "dataset_info.json").write_text(json.dumps(table), "utf-8")
    return ARGUMENTS | {
        "module": THEIRS,
        "model_name_or_path": str(save_model(folder / "model")),
        "stage": "sft",
        "do_train": True,
        "flash_attn": "sdpa",
        "template": "qwen3_vl_nothink",
        "dataset_dir": str(rows.parent),
        "dataset": "rows",
        "val_size": 0.2,
        "cutoff_len": 2048,
        "overwrite_output_dir": True,
    }


@pytest.mark.parametrize(
    ("changed", "before"),
    [
        ({"finetuning_type": "full", "freeze_vision_tower": False}, 47),
        # One row a batch, so that rows of text alone get a blank image.
        ({"finetuning_type": "lora", "per_device_train_batch_size": 1}, 37),
    ],
)
def test_losses_are_equal_and_nothing_syncs(
    changed: dict[str, Any], before: int, config: dict[str, Any], tmp_path: Path
) -> None:
    config = config | changed
    equipped = config | {"module": OURS}
    syncs = compare("LLaMA-Factory", config, equipped, tmp_path, rel=2e-7)
    assert [one["per_step"] for one in syncs] == [before, 0]


@pytest.fixture(scope="module")
def ours() -> Any:
    replace_torchaudio()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(OURS)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"stage": "dpo"}, "not in the stage dpo"),
        ({"use_mca": True}, "without use_mca"),
        ({"packing": True}, "turn packing and neat_packing off"),
        ({"neat_packing": True}, "turn packing and neat_packing off"),
        ({}, None),
    ],
)
def test_other_trainers_and_packed_rows_are_refused(
    ours: Any, changed: dict[str, Any], words: str | None
) -> None:
    usual = {"stage": "sft", "use_mca": False, "use_hyper_parallel": False}
    both = SimpleNamespace(**{**usual, "packing": False, "neat_packing": False, **changed})
    if words is None:
        ours._refuse(both, both)
    else:
        with pytest.raises(MRopeError, match=words):
            ours._refuse(both, both)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_blank_image_stands_behind_its_row(ours: Any, side: str) -> None:
    class Inner:
        tokenizer = SimpleNamespace(padding_side=side)

        def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            features[0]["input_ids"] = [*features[0]["input_ids"], 7, 7]
            return {"attention_mask": torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])}

    rows: list[dict[str, Any]] = [{"input_ids": [5, 6]}, {"input_ids": [5, 6, 5, 6]}]
    collate = ours.UnnumberedCollator(Inner())
    if side == "left":
        with pytest.raises(MRopeError, match="pad on the right"):
            collate(rows)
    else:
        assert collate(rows)["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
