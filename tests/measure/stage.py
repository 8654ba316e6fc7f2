"""Time the stage as a worker runs it, in this checkout and in another.

    PYTHONPATH=src:tests python -m measure.stage ../d2ab200/src [--rounds 8] [--json FILE]

The inner function's batch is given, so that only what the collator adds is timed: position ids alone,
with the vision tensors, and with the examples flattened into one row. On the first four batches of
`configs/bench/2b-mixed8.yaml` and `2b-crops64.yaml`, one after another, since a worker's next batch has
other sizes. Frame sizes are cached, as in all but a worker's first batches. See `measure.alternate` for
warm and cold; cold is what a worker pays.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from measure.alternate import TESTS, cold_seconds, main, warm_seconds

CASES = ("2b-mixed8", "2b-crops64")
BATCHES = 4


def make_payload() -> dict[str, Any]:
    """Return the model's config and the rows of each batch, by case."""
    from mrope.training.config import load_config, model_table
    from mrope.training.dataloader import load_rows

    payload = {}
    for case in CASES:
        cfg = load_config(
            f"{TESTS.parent}/configs/bench/{case}.yaml",
            ["model.dtype=bfloat16"],
        )
        rows: Any = load_rows(cfg)
        size = cfg.dataloader.batch_size
        starts = range(0, BATCHES * size, size)
        batches = [[rows[start + row] for row in range(size)] for start in starts]
        payload[case] = {"config": dict(model_table(cfg.model.config)), "batches": batches}
    return payload


def make_calls(payload: dict[str, Any]) -> dict[str, list[Callable[[], Any]]]:
    """Return calls of three collators for each case, one for each batch."""
    from mrope import MRopeCollator, MRopeSpec, VisionSpec

    calls: dict[str, list[Callable[[], Any]]] = {}
    for case, given in payload.items():
        spec = MRopeSpec.from_config(given["config"], "transformers-5.23")
        vision = VisionSpec.from_config(given["config"])
        collators: dict[str, Callable[..., Any]] = {
            "positions": partial(MRopeCollator, spec=spec),
            "with vision tensors": partial(MRopeCollator, spec=spec, vision=vision),
            "flattened": partial(MRopeCollator, spec=spec, vision=vision, packing="flatten"),
        }
        for name, collator in collators.items():
            calls[f"{case}, {name}"] = [
                partial(collator(partial(copy_of, join(rows))), rows) for rows in given["batches"]
            ]
    return calls


def copy_of(batch: dict[str, Any], examples: Any) -> dict[str, Any]:
    """Return a batch that is ready: an inner collate function that takes no time."""
    return dict(batch)


def join(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the batch of rows of one width, which need no padding."""
    import torch

    batch: dict[str, Any] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        of_tokens = len(values[0]) == len(rows[0]["input_ids"]) and values[0].dim() == 1
        batch[name] = torch.stack(values) if of_tokens else torch.cat(values)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch


if __name__ == "__main__":
    main("measure.stage", make_payload, make_calls, [warm_seconds, cold_seconds])
