"""Rows for `mrope check`, good and bad, and a folder to run the command in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mrope.cli import main
from mrope.spec import example_config
from support.malformed import IMAGE, SMALL, START, VIDEO, image, video
from support.specs import example_spec

SPEC = example_spec()

Row = dict[str, Any]
GOOD: Row = {
    "input_ids": [7, *image(4), 8, *video(4), 8, *video(4)],
    "image_grid_thw": [SMALL],
    "video_grid_thw": [[2, 4, 4]],
}
CUT: Row = {"input_ids": [7, START, IMAGE, IMAGE], "image_grid_thw": [SMALL]}
STRAY: Row = {"input_ids": [7, 7, 7, VIDEO, 7]}


def sprinkled(rows: int) -> list[Row]:
    """Return rows of which every seventh is cut, and every eleventh else has a stray placeholder."""
    return [
        CUT if index % 7 == 3 else STRAY if index % 11 == 5 else grown(index)
        for index in range(rows)
    ]


def grown(words: int) -> Row:
    return {**GOOD, "input_ids": [*GOOD["input_ids"], *[9] * words]}


class Folder:
    """A model's config and a dataset in a folder, and the command run on them."""

    def __init__(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.path = path
        self.capsys = capsys
        self.model = path / "config.json"
        self.model.write_text(json.dumps(example_config("qwen3_vl")), encoding="utf-8")
        # Forked workers start at once, where spawned ones import everything anew.
        self.forking = path / "forking.yaml"
        self.forking.write_text(
            "model: {config: config.json}\ndataloader: {start_method: fork}\n", encoding="utf-8"
        )
        self.out = self.err = ""

    def dataset(self, rows: list[Row]) -> Path:
        file = self.path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return file

    def run(self, *words: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main(words)
        self.out, self.err = self.capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return code

    def check(self, rows: list[Row], *words: str) -> int:
        options = ("--model", str(self.model), "--dataset", str(self.dataset(rows)))
        return self.run("check", *options, *(words or ("--workers", "0")))

    def said(self, name: str) -> str:
        """Return a line of the printed table."""
        found = re.search(rf"^│ {name} +│ (.*?) +│$", self.out, re.MULTILINE)
        assert found is not None, self.out
        return found[1]
