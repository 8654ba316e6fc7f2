"""Count the waits of the Omni thinkers, which `mrope bench waits` has no configs for.

PYTHONPATH=src:tests python tests/support/thinker_waits.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf.test_omni_forwards import FAMILIES, make_batches, make_model
from mrope.bench.conditions import conditions
from mrope.bench.waits import COLUMNS
from mrope.hf import attach
from mrope.training.step import guarded_step

FILE = Path(__file__).parents[2] / "docs/benchmarks/waits-thinkers.json"


def rows() -> list[dict[str, Any]]:
    """Return a row for each thinker and kind of batch, as `mrope bench waits` has them."""
    return [count(family, kind) for family in FAMILIES for kind in ("image", "audio", "all")]


def count(family: str, kind: str) -> dict[str, Any]:
    plain, batch = make_batches(family, kind, padded=False)
    positions = plain | {"position_ids": batch["position_ids"]}
    model = make_model(family)
    counts = [guarded_step(model, one).count for one in (plain, positions, batch)]
    counts.append(guarded_step(attach(model), batch).count)
    media = {"image": "images", "audio": "audio", "all": "all"}[kind]
    case = {"family": family, "attention": "sdpa", "media": media, "padding": "no"}
    return case | dict(zip(COLUMNS, counts, strict=True))


if __name__ == "__main__":
    report = {"conditions": conditions(), "rows": rows()}
    FILE.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
