"""What the tests of training share: small rows of columns, and configs that train on them."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import torch

from mrope.training.config import as_config
from mrope.training.sections import Config
from support.models import model_config, tiny_examples

ATTACHED = {"attach": True}
QUICK = {
    "max_steps": 4,
    "seed": 0,
    "use_cpu": True,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "disable_tqdm": True,
}
FLAT = {"vision": True, "packing": "flatten"}


@cache
def table_of(family: str, rows: int = 6) -> datasets.Dataset:
    """Return rows with images and clips, one in three of text alone, as a table."""
    columns = [
        {name: torch.as_tensor(value).tolist() for name, value in one.items()}
        for seed in range(-(-rows // 3))
        for one in tiny_examples(family, rows=3, seed=seed)
    ]
    return datasets.Dataset.from_list(columns[:rows])


def small(family: str) -> dict[str, Any]:
    """Return the model's config with two layers of text and of tower."""
    table = copy.deepcopy(model_config(family))
    table["text_config"]["num_hidden_layers"] = table["vision_config"]["depth"] = 2
    if "deepstack_visual_indexes" in table["vision_config"]:
        table["vision_config"]["deepstack_visual_indexes"] = [0]
    return table


def write_rows(folder: Path, family: str = "qwen3_vl", rows: int = 6) -> Path:
    file = folder / f"{family}.parquet"
    if not file.exists():
        table_of(family, rows).to_parquet(file)
    return file


def config(folder: Path, family: str = "qwen3_vl", **sections: Any) -> Config:
    """Return a config that trains a small attached model on rows in a folder."""
    table: dict[str, Any] = {
        "model": {"config": small(family), "attach": True, **sections.pop("model", {})},
        "data": sections.pop("data", None) or {"source": str(write_rows(folder, family))},
        "dataloader": {"batch_size": 2, "num_workers": 0, **sections.pop("dataloader", {})},
        "rope": {"vision": True, **sections.pop("rope", {})},
        "trainer": {"output_dir": "out", **QUICK, **sections.pop("trainer", {})},
        **sections,
    }
    return as_config(table, folder, "the test's config")


def losses_of(checkpoint: Path) -> list[float]:
    """Return the losses that a checkpoint's own state lists, one for each step."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]
