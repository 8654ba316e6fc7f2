"""The code of the guides runs with every trainer, and that of lmms-engine where it is installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from integration.common import import_lmms_engine
from integration.lmms_recipe import write_processor
from support.guides import GUIDES, make_workspace, run_guide

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")


@pytest.mark.parametrize("guide", GUIDES)
def test_guides_run_with_every_trainer(
    guide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_workspace(tmp_path, monkeypatch)
    assert run_guide(guide) == []


def test_the_code_for_lmms_engine_runs(tmp_path: Path) -> None:
    import_lmms_engine()
    write_processor(tmp_path, "qwen3_vl")
    page = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")
    # Marked `py`: tests/test_docs.py runs what is marked `python`, without lmms-engine.
    blocks = re.findall(r"```py\n(.*?)```", page, flags=re.DOTALL)
    (block,) = (one for one in blocks if "lmms_engine" in one)
    exec(block, {"processor_name": str(tmp_path)})
