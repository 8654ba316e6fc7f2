"""Print the peers' table as Markdown: a row for each peer, milliseconds, syncs and FLOPs utilisation of each case.

    PYTHONPATH=src:tests python -m measure.peers.table

Reads the runs of these scripts, docs/benchmarks/peers-h200.jsonl and peers-h200-second.jsonl, and for peers that they lack
docs/benchmarks/peers-h200-earlier.txt, an earlier run of the same rows and weights. Rows of the later two are marked.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from measure.peers.flops import utilisation

FOLDER = Path(__file__).parents[3] / "docs/benchmarks"
CASES = {
    "2b-mixed8": "2 rows of 8 images, 16 to 28 patches a side",
    "2b-crops64": "2 rows of 64 crops, 6 to 14 patches a side",
    "2b-s4k": "2 rows of 4,096 tokens: 4 images of one size, a clip",
}
# A peer's name in the raw text, and on the pages; in the order of the table.
PEERS = {
    "transformers, sdpa": "transformers 5.24, sdpa",
    "transformers, flash_attention_2": "transformers, flash path",
    "transformers, flash_attention_2, Liger": "the same, Liger",
    "VeOmni": "VeOmni 0.1.12",
    "lmms-engine": "lmms-engine 0.1.4",
    "torchtitan 169545712, no autotune": "torchtitan, git 1695457",
    "attached": "mrope, attached",
    "attached, Liger": "mrope, attached, Liger",
    "attached, one graph": "mrope, one graph",
}
# Measured in the second run, whose rows of other peers only show how it compares with the first.
_SECOND = (
    "transformers, flash_attention_2, Liger",
    "VeOmni",
    "lmms-engine",
    "attached, Liger",
)
# What marks a cell of the first run, the second, and the earlier one.
MARKS = ("", "\u2020", "\\*")
_LINE = re.compile(
    r"(?P<case>2b-\w+) +(?P<peer>\S.*?) {2,}(?P<ms>[\d.]+) ms \(least (?P<least>[\d.]+)\).*"
    r" (?P<memory>[\d.]+) GiB +syncs (?P<syncs>\d+)"
)


class Cell(NamedTuple):
    """A peer on a case.

    Attributes:
        ms, least_ms: median and least of the steps' milliseconds.
        syncs: of a step.
        memory_gib: peak.
        utilisation: of the peak of bfloat16.
        run: 0 for the first, 1 for the second, 2 for the earlier one.
    """

    ms: float
    least_ms: float
    syncs: int
    memory_gib: float
    utilisation: float
    run: int


def read_lines(run: int) -> list[dict[str, Any]]:
    """Return the lines of a run that have a time."""
    name = ("peers-h200.jsonl", "peers-h200-second.jsonl")[run]
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "ms" in row]


def read_cells() -> dict[tuple[str, str], Cell]:
    """Return each cell by case and peer, from the run that has the peer."""
    names = ("ms", "least_ms", "syncs", "memory_gib", "utilisation")
    found = {
        (row["case"], row["peer"]): Cell(**{name: row[name] for name in names}, run=run)
        for run in (0, 1)
        for row in read_lines(run)
        if (row["peer"] in _SECOND) == bool(run)
    }
    tflop = {row["case"]: float(row["tflop"]) for row in read_lines(0)}
    text = (FOLDER / "peers-h200-earlier.txt").read_text(encoding="utf-8")
    for match in _LINE.finditer(text):
        case, ms = match["case"], float(match["ms"])
        share = utilisation(tflop[case], ms)
        cell = Cell(
            ms, float(match["least"]), int(match["syncs"]), float(match["memory"]), share, 2
        )
        if match["peer"].startswith("torchtitan"):
            found[case, match["peer"]] = cell
    return found


def table(peers: dict[str, str]) -> list[str]:
    """Return the lines of a Markdown table."""
    cells = read_cells()
    lines = ["| | " + " | ".join(CASES.values()) + " |", "|---" * (len(CASES) + 1) + "|"]
    for peer, name in peers.items():
        of_peer = [cells.get((case, peer)) for case in CASES]
        mark = MARKS[max(cell.run for cell in of_peer if cell is not None)]
        lines.append(f"| {name}{mark} | " + " | ".join(map(_words, of_peer)) + " |")
    return lines


def _words(cell: Cell | None) -> str:
    if cell is None:
        return "not run"
    # A number stays with its unit where a narrow page breaks the line.
    return f"{cell.ms:.0f}\u00a0ms, {cell.syncs}, {100 * cell.utilisation:.0f}\u00a0%"


if __name__ == "__main__":
    print("\n".join(table(PEERS | {"attached, fixed shapes": "attached, fixed shapes"})))
