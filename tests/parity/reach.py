"""Run the comparisons of `mrope doctor` under one release of transformers after another.

    PYTHONPATH=src python tests/parity/reach.py ENVIRONMENT RELEASE...

ENVIRONMENT is a scratch environment with torch, numpy and rich: each release is installed into it in
turn. Prints the rows of the table in docs/references.md: how many families are equal, of those that
could be compared, and below it what is not equal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FEATURES = ("positions", "attach", "flatten")
_DOCTOR = """
import sys
from pathlib import Path
from mrope.check.doctor import compare_families
compare_families(Path(sys.argv[1]))
"""

Families = dict[str, dict[str, dict[str, Any]]]


def run_doctor(python: Path, release: str) -> Families | str:
    """Install a release, and return the verdicts under it; or the error that ended the run."""
    install = [str(python), "-m", "pip", "install", "--quiet", f"transformers=={release}"]
    subprocess.run(install, check=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "doctor.json"
        command = [str(python), "-W", "ignore", "-c", _DOCTOR, str(file)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
        if not file.exists():
            return ended.stderr.strip().splitlines()[-1][:80]
        families: Families = json.loads(file.read_text(encoding="utf-8"))["families"]
        return families


def describe(release: str, families: Families | str) -> str:
    """Return a release's row of the table."""
    if isinstance(families, str):
        return f"| {release} | {families} | | |"
    cells = []
    for feature in FEATURES:
        verdicts = [row[feature]["equal"] for row in families.values() if feature in row]
        compared = [one for one in verdicts if one is not None]
        cells.append(f"{sum(compared)} of {len(compared)}" if compared else "not compared")
    return f"| {release} | {' | '.join(cells)} |"


def main(words: list[str]) -> int:
    """Print the table, then every verdict that is not "equal", once for each reason."""
    python = Path(words[0]) / "bin" / "python"
    reasons = []
    print("| transformers |", " | ".join(FEATURES), "|\n|---|---|---|---|", flush=True)
    for release in words[1:]:
        families = run_doctor(python, release)
        print(describe(release, families), flush=True)
        for family, row in families.items() if isinstance(families, dict) else ():
            for feature, verdict in row.items():
                if verdict["equal"] is not True:
                    reasons.append(f"{release} {family} {feature}: {verdict['detail']}")
    print(*reasons, sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
