"""The page of releases says what `make releases` found, and the doctor was asked too."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mrope.spec.references import is_known
from parity.reach import cell, doctor_cell, faults

DOCS = Path(__file__).parents[2] / "docs"
FOUND = json.loads((DOCS / "benchmarks" / "releases.json").read_text(encoding="utf-8"))
PASSED = {
    "a_step_is_as_without": "passed",
    "an_unmodified_model_takes_the_stage_too": "passed",
    "a_step_does_not_sync": "passed",
    "flattened_rows_are_as_padded_ones": "passed",
    "under_flash_attention_patches_and_text_stay_apart": "skipped",
}
SKIPPED = dict.fromkeys(PASSED, "skipped")
Table = dict[str, dict[str, str]]
Minor = tuple[int, int]


def minor(release: str) -> Minor:
    major, second, *_ = release.split(".")
    return int(major), int(second)


def table_of_the_page() -> Table:
    """Return what the page says of every release that was run, by family and release."""
    page = (DOCS / "references.md").read_text(encoding="utf-8")
    table: Table = {}
    for families, since, flattened in re.findall(
        r"^\| ([a-z_0-9, ]+) \| (5\.\d+[^|]*) \| ([^|]*) \|$", page, re.MULTILINE
    ):
        releases = re.findall(r"5\.\d+", since.partition(";")[0])
        first, last = minor(releases[0]), minor(releases[-1])
        since_then = re.match(r"yes, from (5\.\d+)", flattened)
        packs = (minor(since_then[1]),) if since_then else (first,) * flattened.startswith("yes")
        for family in families.split(", "):
            assert family not in table
            table[family] = {one: _cell(minor(one), first, last, *packs) for one in FOUND}
    return table


def _cell(one: Minor, first: Minor, last: Minor, flattened: Minor | None = None) -> str:
    if not first <= one <= last:
        return ""
    return "A" if flattened is None or one < flattened else "A F"


def test_every_cell_of_the_page_was_run() -> None:
    assert {minor(one) for one in FOUND} == {(5, number) for number in range(9, 25)}
    found = {
        family: {release: FOUND[release]["cells"].get(family, "") for release in FOUND}
        for family in FOUND["5.24.0"]["cells"]
    }
    assert table_of_the_page() == found
    assert all(is_known(feature, one) for one in FOUND for feature in ("attach", "flatten"))


def test_a_cell_says_what_passed() -> None:
    assert cell(PASSED) == "A F"
    assert cell(PASSED | {"flattened_rows_are_as_padded_ones": "failed"}) == "A"
    assert cell(PASSED | {"a_step_does_not_sync": "failed"}) == "no"
    assert cell(SKIPPED) == ""


def test_a_doctor_that_says_something_else_is_a_fault() -> None:
    said: list[tuple[dict[str, bool | None], str]] = [
        ({"positions": True, "attach": True, "flatten": True}, "A F"),
        ({"attach": True}, "A"),
        ({"attach": False, "flatten": True}, "no"),
        ({"attach": None, "flatten": None}, ""),
        ({"positions": None}, ""),
    ]
    for verdicts, expected in said:
        assert doctor_cell(verdicts) == expected
        wrong = faults("5.24.0", {"qwen3_vl": PASSED}, {"qwen3_vl": verdicts})
        assert bool(wrong) == (expected != "A F")
    failed = PASSED | {"a_step_does_not_sync": "failed"}
    assert faults("5.24.0", {"qwen3_vl": failed}, {"qwen3_vl": {"attach": False}}) == [
        "5.24.0 qwen3_vl a_step_does_not_sync failed"
    ]
