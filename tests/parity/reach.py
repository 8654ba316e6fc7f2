"""Attach every family under one release of transformers after another, and print the table.

    PYTHONPATH=src:tests python tests/parity/reach.py ENVIRONMENT RELEASE...

ENVIRONMENT is a scratch environment with torch, numpy, rich and pytest: each release is installed
into it in turn, and `tests/parity/test_attached.py` run there. Prints the table of families and
releases in docs/references.md, and below it every test that failed; returns 1 if one did.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
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


def run_release(python: Path, release: str) -> Outcomes:
    """Install a release, and return what each test did under it."""
    install = [str(python), "-m", "pip", "install", "--quiet", f"transformers=={release}"]
    subprocess.run(install, check=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tests.xml"
        tests = ["tests/parity/test_attached.py", f"--junit-xml={file}"]
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
        subprocess.run([*command, *tests], stdout=subprocess.DEVNULL, check=False, env=os.environ)
        return read_outcomes(file)


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


def cell(tests: dict[str, str]) -> str:
    """Return what the table says of a family under a release: A attached, F flattened too."""
    attach, flatten = ({tests[name] for name in names} for names in (ATTACH, FLATTEN))
    if "failed" in attach:
        return "no"
    if "passed" not in attach:
        return ""
    return "A F" if "passed" in flatten and "failed" not in flatten else "A"


def print_table(found: dict[str, Outcomes]) -> bool:
    """Print the table and the failures below it; return whether there is none."""
    minors = [".".join(release.split(".")[:2]) for release in found]
    print(f"| | {' | '.join(minors)} |\n|{'---|' * (len(minors) + 1)}")
    families = list(dict.fromkeys(family for one in found.values() for family in one))
    for family in families:
        print(f"| {family} | {' | '.join(cell(one[family]) for one in found.values())} |")
    failed = [
        f"{release} {family} {test}"
        for release, outcomes in found.items()
        for family, tests in outcomes.items()
        for test, outcome in tests.items()
        if outcome == "failed"
    ]
    print(*failed, sep="\n")
    return not failed


def main(words: list[str]) -> int:
    """Run the releases, and print the table."""
    python = Path(words[0]) / "bin" / "python"
    return 0 if print_table({one: run_release(python, one) for one in words[1:]}) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
