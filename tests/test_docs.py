"""What the documentation says holds: its code runs, its links lead somewhere."""

from __future__ import annotations

import doctest
import importlib
import json
import re
from pathlib import Path
from unittest import mock

import pytest
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser

from mrope import MRopeCollator, build_collator, load_config
from mrope.spec import example_config
from mrope.spec.families import FAMILIES

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
DOCS = sorted(ROOT.rglob("docs/**/*.md"))
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
# The code of the guides needs a model and a dataset: tests/test_guides.py runs it.
PAGES = [file for file in FILES if file.parent.name != "start"]
MOST_PAGES, MOST_LINES, MOST_README_LINES = 22, 200, 120
# Text and target of a Markdown link or picture; the text may run over a line's end.
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def _having(needle: str, files: list[Path]) -> list[str]:
    return [
        str(file.relative_to(ROOT)) for file in files if needle in file.read_text(encoding="utf-8")
    ]


@pytest.mark.parametrize("page", _having("```python", PAGES))
def test_code_blocks_run(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    document = Document.parse(page, PythonCodeBlockParser())
    examples = list(document.examples())
    blocks = (ROOT / page).read_text(encoding="utf-8").count("```python")
    assert len(examples) == blocks
    with mock.patch.dict(FAMILIES):  # a page adds a row of its own
        for example in examples:
            example.evaluate()


@pytest.mark.parametrize("file", _having(">>> ", sorted(SOURCE.rglob("*.py"))))
def test_docstring_examples_run(file: str) -> None:
    parts = Path(file).relative_to("src").with_suffix("").parts
    result = doctest.testmod(importlib.import_module(".".join(parts)))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in FILES])
def test_relative_links_lead_to_files(page: str) -> None:
    file = ROOT / page
    prose = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [target for target in LINK.findall(prose) if not re.match(r"\w+:|#", target)]
    missing = [target for target in targets if not (file.parent / target.split("#")[0]).exists()]
    assert missing == []


def test_the_table_of_families_is_as_the_table_and_the_results_say() -> None:
    families_page = pytest.importorskip("support.families_page", exc_type=ImportError)
    page = families_page.PAGE.read_text(encoding="utf-8")
    assert families_page.rendered(page) == page, "run tests/support/families_page.py"


def test_code_blocks_and_links_are_found() -> None:
    assert "README.md" in _having("```python", PAGES)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(LINK.findall(readme)) > 5


def test_installing_for_a_guide_keeps_the_build_of_torch() -> None:
    lines = [
        line for file in FILES for line in re.findall("pip install.*train.*", file.read_text())
    ]
    assert len(lines) >= 5
    assert all("-c constraints.txt" in line for line in lines)


def test_pages_are_few_and_short() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    listed = re.findall(r": ([\w/-]+\.md)$", navigation.split("\nnot_in_nav:")[0], re.MULTILINE)
    assert len(listed) <= MOST_PAGES
    inside = {str(file.relative_to(ROOT / "docs")) for file in DOCS}
    assert inside - set(listed) == {name for name in inside if name.startswith("contributors/")}
    limits = dict.fromkeys(DOCS, MOST_LINES) | {ROOT / "README.md": MOST_README_LINES}
    for file, most in limits.items():
        assert len(file.read_text(encoding="utf-8").splitlines()) <= most, file


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_config_of_the_front_page_loads(page: str, tmp_path: Path) -> None:
    (block,) = re.findall(
        r"```yaml\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL
    )
    (tmp_path / "train.yaml").write_text(block, encoding="utf-8")
    folder = tmp_path / "Qwen3-VL-2B-Instruct"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(example_config("qwen3_vl")), encoding="utf-8")
    (tmp_path / "rows.parquet").touch()
    collate = build_collator(load_config(tmp_path / "train.yaml"))
    assert isinstance(collate, MRopeCollator) and collate.vision is not None


def test_pictures_are_as_drawn() -> None:
    pictures = pytest.importorskip("support.pictures", exc_type=ImportError)
    drawn = pictures.draw_all()
    assert {file.name for file in pictures.FOLDER.iterdir()} == set(drawn)
    for name, picture in drawn.items():
        text = (pictures.FOLDER / name).read_text(encoding="utf-8")
        assert text == picture.svg(), "run tests/support/pictures.py"
