"""Count the host syncs of the Omni thinkers, for which `mrope bench syncs` has no configs.

PYTHONPATH=src:tests python tests/support/thinker_syncs.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf.test_omni_forwards import FAMILIES, make_batches, make_model
from mrope.bench.harness import conditions, write_json
from mrope.bench.syncs import COLUMNS
from mrope.hf import attach
from mrope.training.step import guarded_step

FILE = Path(__file__).parents[2] / "docs/benchmarks/syncs-thinkers.json"


def count_thinkers() -> list[dict[str, Any]]:
    """Return a row per thinker and kind of batch, with the keys of `mrope bench syncs`."""
    return [count_row(family, kind) for family in FAMILIES for kind in ("image", "audio", "all")]


def count_row(family: str, kind: str) -> dict[str, Any]:
    """Return the case, and the syncs of its step in each of `COLUMNS`."""
    plain, batch = make_batches(family, kind, padded=False)
    positions = plain | {"position_ids": batch["position_ids"]}
    model = make_model(family)
    counts = [guarded_step(model, one).count for one in (plain, positions, batch)]
    counts.append(guarded_step(attach(model), batch).count)
    media = {"image": "images", "audio": "audio", "all": "all"}[kind]
    case = {"family": family, "attention": "sdpa", "media": media, "padding": "no"}
    return case | dict(zip(COLUMNS, counts, strict=True))


if __name__ == "__main__":
    write_json({"conditions": conditions(), "rows": count_thinkers()}, FILE)
