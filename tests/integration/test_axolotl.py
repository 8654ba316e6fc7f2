"""axolotl's own command, plain and with the plug-in, in an environment of its own: make peers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from integration.trainer_main import SCHEDULE, compare
from support.saved import save_model, save_rows

if importlib.util.find_spec("axolotl") is None:
    pytest.skip("axolotl is not installed: make peers", allow_module_level=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("axolotl")
    rows, _ = save_rows(folder / "rows")
    return SCHEDULE | {
        "base_model": str(save_model(folder / "model")),
        "processor_type": "AutoProcessor",
        "chat_template": "qwen2_vl",
        "datasets": [{"path": str(rows), "ds_type": "json", "type": "chat_template"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "skip_prepare_dataset": True,
        "remove_unused_columns": False,
        "sample_packing": False,
        "val_set_size": 4,
        "sequence_len": 2048,
        "pad_to_sequence_len": False,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "bf16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
    }


# Three counts of tokens are copied for its rates, unless they are turned off.
@pytest.mark.parametrize(("rates", "before", "after"), [(True, 74, 3), (False, 71, 0)])
def test_losses_are_equal_and_the_rates_alone_sync(
    rates: bool, before: int, after: int, config: dict[str, Any], tmp_path: Path
) -> None:
    config = config | {"include_tkps": rates}
    plugins = {"plugins": ["mrope.transforms.axolotl.MRopePlugin"]}
    syncs = compare("axolotl", config, config | plugins, tmp_path)
    assert [one["per_step"] for one in syncs] == [before, after]
