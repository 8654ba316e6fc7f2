"""The comparison of two checkouts runs both, and reports what each took."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from measure import alternate, positions_against

PROGRAM = """
import time
from mrope import SECONDS
from measure.alternate import main, warm_seconds

def spin(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

if __name__ == "__main__":
    main("program", lambda: [1, 2], lambda each: {"spin": [lambda: spin(SECONDS)] * len(each)}, [warm_seconds])
"""


def test_two_checkouts_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("here", 0.001), ("other", 0.004)):
        package = tmp_path / name / "mrope"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"SECONDS = {seconds}")
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "measure").symlink_to(Path(alternate.__file__).parent)
    monkeypatch.setattr(alternate, "TESTS", tmp_path)
    payload = tmp_path / "payload.pt"
    torch.save([1, 2], payload)
    sources = {name: tmp_path / name for name in ("here", "other")}
    best = alternate.best_of_rounds("program", payload, sources, 1)
    assert 0.001 <= best["here"]["spin, warm"] < 0.004 <= best["other"]["spin, warm"]


def test_the_table_has_the_ratio() -> None:
    assert alternate.table({"call": 0.001}, {"call": 0.002}).splitlines() == [
        "           here      other  here / other",
        "call   1.000 ms   2.000 ms  0.500",
    ]


def test_positions_are_those_of_the_bench() -> None:
    payload = positions_against.make_payload()
    calls = positions_against.make_calls(payload)
    position_ids, _ = calls["B=2 S=4k, 8 images + 2 videos"][0]()
    assert position_ids.shape == (3, 2, 4096)
    assert len(calls) == len(payload["cases"]) == 10


def test_a_checkout_without_the_package_is_refused(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "measure.stage", str(tmp_path)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (alternate.HERE, alternate.TESTS)))}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 2 and "give the folder src of another checkout" in done.stderr
