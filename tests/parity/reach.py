"""Attach every family under one release of transformers after another, and print the table.

    PYTHONPATH=src:tests python tests/parity/reach.py ENVIRONMENT FILE RELEASE...

ENVIRONMENT is a scratch environment with torch, numpy, pytest and what `mrope doctor` imports: each
release is installed into it in turn, and `tests/parity/test_attached.py` and `mrope doctor` run
there. FILE, a JSON file, gets the cells of each release as soon as it has run; those of other
releases stay. Prints the table of all of them, every test that failed, and every cell of which
`mrope doctor` says something else; returns 1 if there is one.

`tests/test_releases.py` compares FILE with the table in docs/references.md.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

# Tests of `test_attached.py`, without "test_", by what the table says of them.
ATTACH = {
    "a_step_is_as_without",
    "an_unmodified_model_takes_the_stage_too",
    "a_step_does_not_sync",
}
FLATTEN = {
    "flattened_rows_are_as_padded_ones",
    "under_flash_attention_patches_and_text_stay_apart",
}
Outcomes = dict[str, dict[str, str]]  # by family and test
Verdicts = dict[str, dict[str, bool | None]]  # of the doctor, by family and feature


def run_release(python: Path, release: str) -> tuple[Outcomes, Verdicts]:
    """Install a release; return what each test did under it, and what the doctor said."""
    install = [str(python), "-m", "pip", "install", "--quiet", f"transformers=={release}"]
    subprocess.run(install, check=True)
    with tempfile.TemporaryDirectory() as folder:
        tests, doctor = Path(folder) / "tests.xml", Path(folder) / "doctor.json"
        options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", f"--junit-xml={tests}"]
        _run(python, "pytest", *options, "tests/parity/test_attached.py")
        _run(python, "mrope", "doctor", "--json", str(doctor))
        return read_outcomes(tests), read_verdicts(doctor, release)


def _run(python: Path, *words: str) -> None:
    subprocess.run([str(python), "-m", *words], stdout=subprocess.DEVNULL, check=False)


def read_outcomes(file: Path) -> Outcomes:
    """Return passed, skipped or failed, by family and test, from a JUnit file."""
    outcomes: Outcomes = {}
    for case in ET.parse(file).iter("testcase"):
        named = re.fullmatch(r"test_(\w+)\[(\w+)\]", case.attrib["name"])
        assert named is not None, case.attrib["name"]
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "passed"
        outcome = "skipped" if "skipped" in kinds else outcome
        outcomes.setdefault(named[2], {})[named[1]] = outcome
    return outcomes


def read_verdicts(file: Path, release: str) -> Verdicts:
    """Return what `mrope doctor --json` wrote under a release: equal, not equal, not compared."""
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["transformers"] == release, found["transformers"]
    return {
        family: {feature: one["equal"] for feature, one in row.items()}
        for family, row in found["families"].items()
    }


def cell(tests: dict[str, str]) -> str:
    """Return what the table says of a family under a release: A attached, F flattened too."""
    attach, flatten = ({tests[name] for name in names} for names in (ATTACH, FLATTEN))
    if "failed" in attach:
        return "no"
    if "passed" not in attach:
        return ""
    return "A F" if "passed" in flatten and "failed" not in flatten else "A"


def doctor_cell(verdicts: dict[str, bool | None]) -> str:
    """Return the same by what the doctor said of the family."""
    attach = verdicts.get("attach")
    if not attach:
        return "no" if attach is False else ""
    return "A F" if verdicts.get("flatten") else "A"


def faults(release: str, outcomes: Outcomes, verdicts: Verdicts) -> list[str]:
    """Return the tests that failed under a release, and the cells of which the doctor differs."""
    failed = [
        f"{release} {family} {test} failed"
        for family, tests in outcomes.items()
        for test, outcome in tests.items()
        if outcome == "failed"
    ]
    pairs = {name: (cell(tests), doctor_cell(verdicts[name])) for name, tests in outcomes.items()}
    return failed + [
        f"{release} {family}: the tests say {tests!r}, the doctor {doctor!r}"
        for family, (tests, doctor) in pairs.items()
        if tests != doctor
    ]


def print_table(cells: dict[str, Any]) -> None:
    """Print families against releases."""
    minors = [".".join(release.split(".")[:2]) for release in cells]
    print(f"| | {' | '.join(minors)} |\n|{'---|' * (len(minors) + 1)}")
    for family in dict.fromkeys(family for one in cells.values() for family in one["cells"]):
        row = (one["cells"].get(family, "") for one in cells.values())
        print(f"| {family} | {' | '.join(row)} |")


def main(words: list[str]) -> int:
    """Run the releases, write their cells, and print the table of all that were run."""
    python, file = Path(words[0]) / "bin" / "python", Path(words[1])
    cells = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    wrong = []
    for release in words[2:]:
        outcomes, verdicts = run_release(python, release)
        wrong += faults(release, outcomes, verdicts)
        cells[release] = {
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
            "cells": {family: cell(tests) for family, tests in outcomes.items()},
        }
        in_order = sorted(cells, key=lambda one: [int(number) for number in one.split(".")])
        cells = {one: cells[one] for one in in_order}
        file.write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
    print_table(cells)
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
