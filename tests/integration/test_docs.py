"""The code of the trainers' pages runs as it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser

from integration.common import build_processor, import_lmms_engine
from integration.lmms_recipe import write_processor

ROOT = Path(__file__).parents[2]
PAGES = sorted(page.stem for page in ROOT.glob("docs/trainers/*.md") if page.stem != "index")
# What a page needs in order to run beside what it shows.
NEEDS = {
    "trl": "trl",
    "lightning": "lightning",
    "torchdata": "torchdata",
    "accelerate": "accelerate",
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


def names(page: str, folder: Path) -> dict[str, Any]:
    """Return what a page takes for given; skip the test where its trainer is not installed."""
    if page == "lmms-engine":
        import_lmms_engine()
        write_processor(folder, "qwen3_vl")
        return {"processor_name": str(folder)}
    pytest.importorskip(NEEDS.get(page, "transformers"))
    return {"processor": build_processor("demo")} if page == "trl" else {}


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    given = names(page, tmp_path)
    document = Document.parse(f"docs/trainers/{page}.md", PythonCodeBlockParser())
    document.namespace.update(given)
    examples = list(document.examples())
    assert len(examples) == document.text.count("```python") > 0
    for example in examples:
        example.evaluate()
