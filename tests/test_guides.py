"""The guides for users run from top to bottom, and so do the commands that they show."""

from __future__ import annotations

from pathlib import Path

import pytest

from mrope.cli import main

guides = pytest.importorskip("support.guides", exc_type=ImportError)

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    guides.make_workspace(tmp_path, monkeypatch)
    return tmp_path


@pytest.mark.parametrize("guide", guides.GUIDES)
def test_code_blocks_run(guide: str, workspace: Path) -> None:
    skipped = guides.run_guide(guide)
    # Only what a trainer needs beside the development packages: make integration runs the rest.
    assert all("trl" in example.parsed or "lightning" in example.parsed for example in skipped)


@pytest.mark.parametrize("guide", guides.GUIDES)
def test_commands_run(guide: str, workspace: Path) -> None:
    shown = guides.commands(guide)
    assert shown
    for words in shown:
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0, words
