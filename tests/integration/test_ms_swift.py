"""`swift sft`, plain and with the plug-in, in an environment of its own: make peers."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from integration.trainer_main import ARGUMENTS, compare
from mrope.errors import MRopeError
from support.saved import save_model, save_rows

if importlib.util.find_spec("swift") is None:
    pytest.skip("ms-swift is not installed: make peers", allow_module_level=True)

PLUGIN = """from mrope.transforms.ms_swift import register
register()
"""
WHOLE = {"freeze_vit": False, "freeze_aligner": False}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ms-swift")
    _, rows = save_rows(folder / "rows")
    return ARGUMENTS | {
        "model": str(save_model(folder / "model")),
        "model_type": "qwen3_vl",
        "template": "qwen3_vl",
        "dataset": str(rows),
        "split_dataset_ratio": 0.2,
        "torch_dtype": "float32",
        "attn_impl": "sdpa",
        "max_length": 2048,
        "gradient_accumulation_steps": 1,
        "warmup_ratio": 0,
        "check_model": False,
    }


# What remains is ms-swift's own at each step: the first label, two copies for its accuracy, and
# whether the norm of the gradients is NaN.
@pytest.mark.parametrize(
    ("tuner", "before"), [({"tuner_type": "full"} | WHOLE, 56), ({"tuner_type": "lora"}, 46)]
)
def test_losses_are_equal_and_four_syncs_are_left(
    tuner: dict[str, Any], before: int, config: dict[str, Any], tmp_path: Path
) -> None:
    config = config | tuner
    (tmp_path / "plugin.py").write_text(PLUGIN, "utf-8")
    plugin = {"external_plugins": str(tmp_path / "plugin.py"), "callbacks": "mrope"}
    plain, equipped = compare("ms-swift", config, config | plugin, tmp_path)
    assert plain["per_step"] == before and equipped["per_step"] == 4
    functions = {place["function"] for place in equipped["places"]}
    assert functions == {"prepare_logits_to_keep", "compute_acc", "clip_grad_norm_"}


@pytest.mark.parametrize(
    ("kind", "changed", "words"),
    [
        ("Qwen2VLTemplate", {}, "runs the tower outside"),
        ("Qwen3_5Template", {}, "runs the tower outside"),
        ("Qwen3VLTemplate", {"padding_free": True}, "turn padding_free and packing off"),
        ("Qwen3VLTemplate", {"packing": True}, "turn padding_free and packing off"),
        ("Qwen3VLTemplate", {"padding_side": "left"}, "with padding_side right"),
        ("Qwen3VLTemplate", {}, None),
    ],
)
def test_templates_that_do_more_are_refused(
    kind: str, changed: dict[str, Any], words: str | None
) -> None:
    module = importlib.import_module("mrope.transforms.ms_swift")
    template = getattr(importlib.import_module("swift.template.templates.qwen"), kind)
    made = template.__new__(template)
    meta = SimpleNamespace(template_type="of the test")
    state = {"padding_free": False, "packing": False, "padding_side": "right", **changed}
    vars(made).update(template_meta=meta, **state)
    if words is None:
        module._refuse_template(made)
    else:
        with pytest.raises(MRopeError, match=words):
            module._refuse_template(made)
