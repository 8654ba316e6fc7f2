"""Every number of the front page stands in a raw output under docs/benchmarks/."""

from __future__ import annotations

import ast
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from measure.peers.table import FOLDER, read_cells, read_lines
from support.front_page import BENCHMARKS, INDEX, README, as_index, with_table

# Prose with measured numbers, and the raw output that has them.
CLAIMS = {
    "364 ms in the first case (sdpa), attached 246": "peers-h200-second.jsonl",
    "1.09 samples a second": "eight-b-h200.txt",
    "`equip` at 3.01": "eight-b-h200.txt",
    "at 3.88": "eight-b-h200.txt",
    "LoRA at 1.94 and 2.84": "eight-b-h200.txt",
    "646 ms a step": "linear-h200/qwen3_5-short.txt",
    "353 attached": "linear-h200/qwen3_5-short.txt",
    "250 compiled layer by layer": "linear-h200/qwen3_5-short.txt",
    "1120, 566 and 337": "linear-h200/qwen3_5-short-no-kernels.txt",
    "833 ms in place of 888": "one-graph-h200.txt",
    "1922 in place of 2105": "ranks-h200/step.txt",
    "1686 in place of 1748": "ranks-h200/step.txt",
    "35.7, 34.5, 25.2": "peers-h200.jsonl",
    "22.6 GiB": "peers-h200-second.jsonl",
    "0.29 and 0.33 ms": "stage.txt",
}
# Seconds of a step, of the plain and the equipped Trainer: what its steps after the measured ones took.
LATER = {
    "2.4 s against 1.3": ("full-plain", "full-equipped"),
    "1.4 s against 1.0": ("lora-plain", "lora-equipped"),
}
# What needs no measurement: bounds of tests, and sizes of what was measured.
_MEASURED = re.compile(
    r"\d[\d.,]*(?: and \d[\d.]*)? ?(?:ms\b|µs|s against|GiB|%|times\b|TFLOP|samples)|\d+ in place"
)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def prose(page: str) -> str:
    page = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    page = re.sub(r"<!-- peers -->.*?<!-- /peers -->", "", page, flags=re.DOTALL)
    return re.sub(r"\]\([^)]*\)", "]", page)


def readme() -> str:
    return README.read_text(encoding="utf-8")


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_is_measured(claim: str) -> None:
    assert claim in prose(readme()).replace("\n", " ").replace("[", "").replace("]", "")
    raw = [float(one) for one in _NUMBER.findall((FOLDER / CLAIMS[claim]).read_text("utf-8"))]
    for number in _NUMBER.findall(claim):
        places = len(number.partition(".")[2])
        assert any(f"{value:.{places}f}" == number for value in raw), number


def later_seconds() -> dict[str, float]:
    """Return the seconds of a step behind the measured ones, from the time of a run in all."""
    found: dict[str, float] = {}
    lines = (FOLDER / "eight-b-h200.txt").read_text("utf-8").splitlines()
    for before, line in pairwise(lines):
        if '"run"' in line:
            run, whole = json.loads(line), ast.literal_eval(before)["train_runtime"]
            found[run["run"]] = (float(whole) - run["first_steps_s"] - run["ms"] / 100) / 2
    return found


@pytest.mark.parametrize("claim", LATER)
def test_later_steps_are_those_that_were_run(claim: str) -> None:
    assert claim in prose(readme()).replace("\n", " ")
    seconds = later_seconds()
    assert [f"{seconds[run]:.1f}" for run in LATER[claim]] == re.findall(r"\d\.\d", claim)


def test_no_other_number_is_measured() -> None:
    text = prose(readme()).replace("\n", " ").replace("[", "").replace("]", "")
    for claim in (*CLAIMS, *LATER):
        text = text.replace(claim, "")
    assert _MEASURED.findall(text) == []


@pytest.mark.parametrize("file", [README, BENCHMARKS])
def test_the_table_is_that_of_the_raw_output(file: Path) -> None:
    page = file.read_text(encoding="utf-8")
    assert with_table(page) == page, "run tests/support/front_page.py"


def test_losses_of_the_table_agree() -> None:
    """Ours with transformers' within 1e-3, and all with each other within 1.2e-3."""
    rows = read_lines(0) + read_lines(1)
    for case in {case for case, _ in read_cells()}:
        losses = {row["peer"]: row["losses"] for row in rows if row["case"] == case}
        assert len(losses) == 9
        for number in range(2):
            all_of = {peer: found[number] for peer, found in losses.items()}
            plain = all_of["transformers, sdpa"]
            ours = [loss for peer, loss in all_of.items() if peer.startswith("attached")]
            assert len(ours) == 4 and max(abs(loss - plain) for loss in ours) < 1e-3
            assert max(all_of.values()) - min(all_of.values()) < 1.2e-3


def test_the_site_has_the_same_page() -> None:
    assert INDEX.read_text(encoding="utf-8") == as_index(readme()), (
        "run tests/support/front_page.py"
    )
