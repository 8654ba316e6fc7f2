"""Time position ids in this checkout and in another, on the batches of `mrope bench positions`.

    PYTHONPATH=src:tests python -m measure.positions_against ../d2ab200/src [--rounds 8] [--json FILE]

Calls `mrope.rope_index` on every case, largest batches included, with warm
caches, as that command does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from measure.alternate import main, warm_seconds


def make_payload() -> dict[str, Any]:
    """Return the config, and the arguments of `rope_index` of each case."""
    from mrope import MRopeSpec
    from mrope.bench.positions import CASES, SWEEP, make_batch
    from mrope.spec.spec import example_config

    config = example_config("qwen3_vl")
    spec = MRopeSpec.from_config(config, "transformers-5.23")
    cases = {case.name: make_batch(case, spec) for case in CASES}
    sweep = {f"B=1 S=64k, {case.name}": make_batch(case, spec) for case in SWEEP}
    return {"config": config, "cases": cases | sweep}


def make_calls(payload: dict[str, Any]) -> dict[str, list[Callable[[], Any]]]:
    """Return a call of the kernel for each case."""
    from mrope import MRopeSpec, rope_index

    spec = MRopeSpec.from_config(payload["config"], "transformers-5.23")
    return {name: [partial(rope_index, spec, **batch)] for name, batch in payload["cases"].items()}


if __name__ == "__main__":
    main("measure.positions_against", make_payload, make_calls, [warm_seconds])
