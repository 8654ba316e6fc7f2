"""Write the site's front page from README.md, and the table of peers into all pages that have it.

PYTHONPATH=src:tests python tests/support/front_page.py
"""

from __future__ import annotations

import re
from pathlib import Path

from measure.peers.table import PEERS, table

ROOT = Path(__file__).parents[2]
README, INDEX = ROOT / "README.md", ROOT / "docs/index.md"
BENCHMARKS = ROOT / "docs/benchmarks.md"
_MARKS = "<!-- peers -->", "<!-- /peers -->"


def with_table(page: str) -> str:
    """Return a page with the table of peers between its marks, our rows in bold."""
    before, _, rest = page.partition(f"{_MARKS[0]}\n")
    lines = [re.sub(r"^\| (mrope, [\w ,]*\w)", r"| **\1**", line) for line in table(PEERS)]
    after = rest.partition(_MARKS[1])[2]
    return "\n".join((before + _MARKS[0], *lines, _MARKS[1])) + after


def as_index(readme: str) -> str:
    """Return README.md as a page of the site: links start in docs/, files outside are not linked."""
    page = readme.replace("](docs/", "](")
    page = re.sub(r"- \*\*Change it:\*\*.*\n", "", page)
    return re.sub(r"\[([^\]]+)\]\(LICENSE\)", r"\1", page)


if __name__ == "__main__":
    for file in (README, BENCHMARKS):
        file.write_text(with_table(file.read_text(encoding="utf-8")), encoding="utf-8")
    INDEX.write_text(as_index(README.read_text(encoding="utf-8")), encoding="utf-8")
