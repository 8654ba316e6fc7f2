"""Run the guides of `docs/start` as a reader would: in a folder that has a model and a dataset.

The code of the guides stands as readers copy it, with the hub name of a model. Here that name is a
folder of a small Qwen3-VL with random weights, so that nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from sybil import Example
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from integration.common import build_processor
from mrope.training.demo.tokenizer import build_tokenizer
from support.models import model_config
from support.saved import save_dataset

FOLDER = Path(__file__).parents[2] / "docs" / "start"
GUIDES = sorted(page.stem for page in FOLDER.glob("*.md"))
MODEL = "Qwen/Qwen3-VL-2B-Instruct"
# Packages that only `make integration` installs; a block that imports one is skipped without it.
OPTIONAL = ("trl", "lightning")


def make_workspace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `folder` the current one, with what the guides read in it: a model and a dataset."""
    monkeypatch.chdir(folder)
    config = dict(model_config("demo"))
    torch.manual_seed(0)
    live = AutoConfig.for_model(config.pop("model_type"), **config)
    AutoModelForImageTextToText.from_config(live).save_pretrained(MODEL)
    build_tokenizer().save_pretrained(MODEL)
    (Path(MODEL) / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "size": {"shortest_edge": 32**2, "longest_edge": 256**2},
                "patch_size": 16,
                "temporal_patch_size": 2,
                "merge_size": 2,
                "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3,
            }
        )
    )
    # Without torchvision transformers cannot build the processor of videos, and so none.
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: build_processor("demo"))
    save_dataset("train")


def run_guide(guide: str) -> list[Example]:
    """Run the blocks of a guide in order, in one namespace, and return those that were skipped."""
    document = Document.parse(str(FOLDER / f"{guide}.md"), PythonCodeBlockParser())
    examples = list(document.examples())
    assert len(examples) == document.text.count("```python") > 0
    skipped = [example for example in examples if _missing(example.parsed)]
    for example in examples:
        if example not in skipped:
            example.evaluate()
    return skipped


def commands(guide: str) -> list[list[str]]:
    """Return the words of each `mrope` command that a guide shows in a console block."""
    text = (FOLDER / f"{guide}.md").read_text(encoding="utf-8")
    return [line.split() for line in re.findall(r"^\$ mrope (.*)$", text, flags=re.MULTILINE)]


def _missing(source: str) -> bool:
    return any(
        re.search(rf"^(from|import) {package}\b", source, flags=re.MULTILINE)
        and importlib.util.find_spec(package) is None
        for package in OPTIONAL
    )
