"""Time the stage as a worker runs it, on batches of a config: `mrope bench stage CONFIG`.

The inner collate function's batch is ready, so that the times are of what `MRopeCollator` adds:

- positions: position ids and rope deltas;
- vision tensors: the vision tower's tensors too, for families with a known tower;
- flattened: those, and the examples in one row, for models that keep examples apart.

"warm": the stage called again and again. "in a worker": after other work, such as decoding and
copying pixels, which leaves nothing of the last call in the processor's caches; this is what a user
pays. Medians on one thread, averaged over the batches, whose frame sizes are cached.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from mrope.bench.harness import (
    conditions,
    interleaved_medians,
    make_console,
    make_table,
    medians_after_other_work,
    microseconds,
    one_line,
    one_thread,
    write_json,
)
from mrope.collate.collator import MRopeCollator
from mrope.collate.packing import Flatten
from mrope.columns import Columns, NewColumns
from mrope.errors import MRopeError
from mrope.towers import VisionSpec
from mrope.training.config import build_collator, load_config
from mrope.training.dataloader import load_rows, make_loader
from mrope.training.sections import Config

_BATCHES = 4
_TIMES = {"warm": interleaved_medians, "in a worker": medians_after_other_work}
Examples = Sequence[Any]


def bench_stage(
    configs: list[Path], overrides: list[str], repeats: int, json_file: Path | None
) -> None:
    """Measure the first batches of every config, print a table, and write JSON if given.

    Args:
        configs: training configs; their rows, batch size or budgets and model are used.
        overrides: `KEY=VALUE`, as for `load_config`.
        repeats: interleaved rounds, at least 1.

    Raises:
        ConfigError, MRopeError: as `load_rows` does.
    """
    report: NewColumns = {"conditions": conditions(), "repeats": repeats, "cases": {}}
    table = make_table(
        "the stage: median time of a batch, one thread", ("config", "batch"), [*_TIMES]
    )
    with one_thread():
        for path in configs:
            case = measure_case(load_config(path, overrides), repeats)
            report["cases"][path.stem] = case
            title = f"{path.stem}\n{case['tokens']:,} tokens"
            for name, seconds in case["seconds"].items():
                table.add_row(title, name, *map(microseconds, seconds.values()))
                title = ""
            table.add_section()
    console = make_console()
    console.print(table)
    console.print(one_line(report["conditions"]))
    write_json(report, json_file)


def measure_case(cfg: Config, repeats: int) -> NewColumns:
    """Return the mean number of tokens of the first batches, and seconds of each variant."""
    batches = first_batches(cfg)
    inner = build_collator(_with_rope(cfg, enabled=False))
    ready = [inner(examples) for examples in batches]
    measured: dict[str, list[dict[str, float]]] = {}
    for examples, batch in zip(batches, ready, strict=True):
        stages = make_stages(cfg, partial(_copied, batch))
        calls: dict[str, Callable[[], Any]] = {
            name: partial(stage, examples) for name, stage in stages.items()
        }
        for kind, medians in _TIMES.items():
            measured.setdefault(kind, []).append(medians(calls, repeats))
    return {
        "tokens": sum(batch["input_ids"].numel() for batch in ready) // len(ready),
        "seconds": {
            name: {
                kind: statistics.fmean(one[name] for one in found)
                for kind, found in measured.items()
            }
            for name in stages
        },
    }


def first_batches(cfg: Config) -> list[Examples]:
    """Return the examples of the first batches that the config's DataLoader would collate."""
    loading = cfg.dataloader.model_copy(update={"num_workers": 0, "pin_memory": False})
    in_process = cfg.model_copy(update={"dataloader": loading})
    loader = make_loader(in_process, load_rows(cfg), list)
    return list(islice(loader, _BATCHES))


def make_stages(cfg: Config, inner: Callable[[Any], Any]) -> dict[str, MRopeCollator]:
    """Return a collator for each variant that the model's family has."""
    spec, vision = cfg.spec(), None
    stages = {"positions": MRopeCollator(inner, spec)}
    if spec.family_row.tower is not None:
        vision = VisionSpec.from_config(cfg.model.config)
        stages["vision tensors"] = MRopeCollator(inner, spec, vision)
    with suppress(MRopeError):  # a model whose examples would attend to each other
        packing = Flatten(attached=True)
        stages["flattened"] = MRopeCollator(inner, spec, vision, packing=packing)
    return stages


def _with_rope(cfg: Config, **values: object) -> Config:
    return cfg.model_copy(update={"rope": cfg.rope.model_copy(update=values)})


def _copied(batch: Columns, _: object) -> NewColumns:
    """Be an inner collate function that takes no time: the batch is ready."""
    return dict(batch)
