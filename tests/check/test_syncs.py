"""`mrope syncs`: before and after, side by side, for a config and for a model alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from mrope import MRopeError, load_config
from mrope.check.syncs import (
    TRAINER_RECIPE,
    count_step_syncs,
    print_step_syncs,
    run_trainer,
)
from mrope.cli import main
from mrope.hf import SyncReport
from support.models import CONFIGS, MODEL_FAMILIES, model_config


def test_a_step_of_the_demo_waits_before_and_not_after() -> None:
    before, after = count_step_syncs(load_config(CONFIGS / "demo.yaml", ["data.rows=4"]))
    assert sum(site.count for site in before) > 50
    assert after == []
    assert any(site.function.startswith("get_rope_index") for site in before)


@pytest.mark.parametrize(
    "family",
    [*MODEL_FAMILIES, "glm4v", "ernie4_5_vl_moe", "paddleocr_vl", "cosmos3_edge", "lfm3_vl"],
)
def test_a_model_alone_is_enough(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(model_config(family)), encoding="utf-8")
    print_step_syncs(None, [], str(tmp_path))
    (total,) = (line for line in capsys.readouterr().out.splitlines() if "in all" in line)
    plain, attached = (int(cell) for cell in total.split("│")[3:5])
    assert attached == 0 < plain


def test_the_trainer_has_none_with_the_recipe(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    overrides = ["data.rows=8", "dataloader.num_workers=0", "model.attach=true", "rope.vision=true"]
    cfg = load_config(CONFIGS / "demo.yaml", overrides)
    before, after = (SyncReport(2, 1, quiet=True) for _ in range(2))
    assert run_trainer(cfg, {}, before) == run_trainer(cfg, TRAINER_RECIPE, after)
    assert before.by_kind().keys() == {"copy", "trainer"}
    assert (after.watched, after.count) == (2, 0)


def test_the_trainer_s_report_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate")
    (tmp_path / "config.json").write_text(json.dumps(model_config("qwen3_vl")), encoding="utf-8")
    with pytest.raises(SystemExit, match="0"):
        main(["syncs", "--model", str(tmp_path), "--trainer"])
    printed = capsys.readouterr().out
    assert "0 syncs in 10 optimizer steps" in printed
    assert "logging_nan_inf_filter=False" in printed


def test_either_a_config_or_a_model() -> None:
    with pytest.raises(MRopeError, match="give a CONFIG or --model, and not both"):
        print_step_syncs(None, [], None)
