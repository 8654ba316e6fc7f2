"""Every number of the front page stands in a raw output under docs/benchmarks/."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from measure.peers.table import FOLDER, read_cells
from support.front_page import BENCHMARKS, INDEX, README, as_index, with_table

# Prose with measured numbers, and the raw output that has them.
CLAIMS = {
    "337, 829 and 530 ms": "peers-h200-earlier.txt",
    "2105 to 1922 ms": "ranks-h200/step.txt",
    "1748 to 1686 in": "ranks-h200/step.txt",
    "35.7, 34.5 and 25.2 GiB": "peers-h200.jsonl",
    "0.52 and 0.87 ms": "stage.txt",
}
# What needs no measurement: bounds of tests, and sizes of what was measured.
_MEASURED = re.compile(
    r"\d[\d.,]*(?: and \d[\d.]*)? ?(?:ms\b|µs|GiB|%|times\b|TFLOP)|\d+ to \d+ in\b"
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


def test_no_other_number_is_measured() -> None:
    text = prose(readme()).replace("\n", " ").replace("[", "").replace("]", "")
    for claim in CLAIMS:
        text = text.replace(claim, "")
    assert _MEASURED.findall(text) == []


@pytest.mark.parametrize("file", [README, BENCHMARKS])
def test_the_table_is_that_of_the_raw_output(file: Path) -> None:
    page = file.read_text(encoding="utf-8")
    assert with_table(page) == page, "run tests/support/front_page.py"


def test_losses_of_the_table_agree_within_1e_3() -> None:
    import json

    rows = [json.loads(line) for line in (FOLDER / "peers-h200.jsonl").read_text().splitlines()]
    for case in {case for case, _ in read_cells()}:
        pairs = [row["losses"] for row in rows if row.get("case") == case and "losses" in row]
        assert len(pairs) > 4
        for losses in zip(*pairs, strict=True):
            assert max(losses) - min(losses) < 1e-3


def test_the_site_has_the_same_page() -> None:
    assert INDEX.read_text(encoding="utf-8") == as_index(readme()), (
        "run tests/support/front_page.py"
    )
