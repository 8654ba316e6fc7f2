"""axolotl's own command, plain and with the plug-in, in an environment of its own: make peers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from integration.trainer_main import STEPS, assert_equal_losses, run
from support.saved import save_model, save_rows

if importlib.util.find_spec("axolotl") is None:
    pytest.skip("axolotl is not installed: make peers", allow_module_level=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("axolotl")
    rows, _ = save_rows(folder / "rows")
    return {
        "base_model": str(save_model(folder / "model")),
        "processor_type": "AutoProcessor",
        "chat_template": "qwen2_vl",
        "datasets": [{"path": str(rows), "ds_type": "json", "type": "chat_template"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "skip_prepare_dataset": True,
        "remove_unused_columns": False,
        "sample_packing": False,
        "val_set_size": 4,
        "eval_steps": STEPS,
        "sequence_len": 2048,
        "pad_to_sequence_len": False,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "bf16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "logging_steps": 500,
        "save_strategy": "no",
        "seed": 0,
    }


# Three counts of tokens are copied for its rates, unless they are turned off.
@pytest.mark.parametrize(("rates", "before", "after"), [(True, 74, 3), (False, 71, 0)])
def test_losses_are_equal_and_the_rates_alone_sync(
    rates: bool, before: int, after: int, config: dict[str, Any], tmp_path: Path
) -> None:
    config = {**config, "include_tkps": rates}
    plain = run("axolotl", config, tmp_path)
    config = {**config, "plugins": ["mrope.transforms.axolotl.MRopePlugin"]}
    equipped = run("axolotl", config, tmp_path)
    assert plain["eval"]
    assert_equal_losses(plain, equipped)
    assert [one["syncs"]["per_step"] for one in (plain, equipped)] == [before, after]
