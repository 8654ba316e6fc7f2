"""`pyproject.toml`: what is imported is declared, and an index shows the README with living links."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PROJECT: Any = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())
UNDECLARED = {"axolotl", "llamafactory", "lmms_engine", "nemo_automodel", "swift", "verl"}
DISTRIBUTIONS = {
    "PIL": "pillow",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}


def imported() -> dict[str, set[str]]:
    """Return the packages that the source imports, each with the files that do."""
    found: dict[str, set[str]] = {}
    for file in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            for name in names:
                found.setdefault(name.partition(".")[0], set()).add(file.name)
    return found


def test_every_package_that_is_imported_is_declared() -> None:
    project = PROJECT["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {re.split(r"[\[<>=]", one)[0].replace("-", "_") for some in lists for one in some}
    missing = {
        name: files
        for name, files in imported().items()
        if name not in sys.stdlib_module_names
        and name not in {"mrope", *UNDECLARED}
        and DISTRIBUTIONS.get(name, name).replace("-", "_") not in declared
    }
    assert missing == {}


def test_links_of_the_readme_are_absolute_on_an_index_and_lead_somewhere() -> None:
    (address,) = PROJECT["project"]["urls"].values()
    rules = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]
    own = shown = (ROOT / "README.md").read_text()
    for rule in rules:
        # One address: what stands in the rules is the project's.
        assert f"({address}/" in rule["replacement"]
        shown = re.sub(rule["pattern"], rule["replacement"], shown)
    before, after = (re.findall(r"\]\(([^)]+)\)", text) for text in (own, shown))
    assert len(before) == len(after) > 10
    for link, target in zip(before, after, strict=True):
        assert target.startswith("https://"), target
        if not link.startswith("https://"):
            assert target.endswith("/main/" + link), target
            assert (ROOT / link.partition("#")[0]).exists(), link
