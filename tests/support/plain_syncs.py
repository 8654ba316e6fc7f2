"""Count the host syncs of the families that `mrope bench syncs` does not count.

Those with 1-D positions, those whose images have sizes of their own, and those that run under eager
attention alone.

PYTHONPATH=src:tests python tests/support/plain_syncs.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf import test_crop_forwards
from mrope.bench.harness import conditions, write_json
from mrope.bench.syncs import COLUMNS
from mrope.hf import attach
from mrope.hf.rows import ROWS
from mrope.training.step import guarded_step
from support.models import EAGER_FAMILIES, PLAIN_FAMILIES, SIZED_FAMILIES, tiny_model
from support.steps import MEDIA, make_batches

FILE = Path(__file__).parents[2] / "docs/benchmarks/syncs-plain.json"


def count_all() -> list[dict[str, Any]]:
    """Return a row for each family, and for batches with padding and without."""
    families = (*PLAIN_FAMILIES, *SIZED_FAMILIES, *EAGER_FAMILIES)
    return [count_row(family, padded) for family in families for padded in (True, False)]


def count_row(family: str, padded: bool) -> dict[str, Any]:
    """Return the case, and the syncs of its step in each of `COLUMNS`."""
    if family == test_crop_forwards.FAMILY:
        plain, batch = test_crop_forwards.make_batches(padded)
    else:
        plain, batch = make_batches(family, MEDIA["images"], padded)
    positions = plain | {"position_ids": batch["position_ids"]}
    attention = "eager" if family in EAGER_FAMILIES else "sdpa"
    model = tiny_model(family, attention).train()
    counts: list[int | None]
    counts = [guarded_step(model, one).count for one in (plain, positions, batch)]
    attachable = family in ROWS
    counts.append(guarded_step(attach(model), batch).count if attachable else None)
    padding = "yes" if padded else "no"
    case = {"family": family, "attention": attention, "media": "images", "padding": padding}
    return case | dict(zip(COLUMNS, counts, strict=True))


if __name__ == "__main__":
    write_json({"conditions": conditions(), "rows": count_all()}, FILE)
