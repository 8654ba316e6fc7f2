"""`mrope syncs`: before and after, side by side, for a config and for a model alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from mrope import MRopeError, load_config
from mrope.check.syncs import count_step_syncs, print_step_syncs
from support.models import CONFIGS, MODEL_FAMILIES, model_config


def test_a_step_of_the_demo_waits_before_and_not_after() -> None:
    before, after = count_step_syncs(load_config(CONFIGS / "demo.yaml", ["data.rows=4"]))
    assert sum(site.count for site in before) > 50
    assert after == []
    assert any(site.function.startswith("get_rope_index") for site in before)


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_a_model_alone_is_enough(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(model_config(family)), encoding="utf-8")
    print_step_syncs(None, [], str(tmp_path))
    (total,) = (line for line in capsys.readouterr().out.splitlines() if "in all" in line)
    plain, attached = (int(cell) for cell in total.split("│")[3:5])
    assert attached == 0 < plain


def test_either_a_config_or_a_model() -> None:
    with pytest.raises(MRopeError, match="give a CONFIG or --model, and not both"):
        print_step_syncs(None, [], None)
