"""How often does the host wait in a training step? Counted, not timed: `mrope bench waits`.

One step, forward and backward, of each given config's model, on made-up batches with images, videos
or both, padded and not, under sdpa and eager: of the plain model, with positions in the batch, with
the vision tensors too, and attached.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mrope.bench.conditions import conditions
from mrope.bench.tiny import tiny_examples
from mrope.collate.collator import MRopeCollator
from mrope.collate.padding import PaddingCollator
from mrope.hf import attach
from mrope.hf.attach import ALL_READERS
from mrope.spec.families import Family
from mrope.towers.vision import VisionSpec
from mrope.training.config import load_config, model_table
from mrope.training.model import build_model
from mrope.training.sections import Config
from mrope.training.step import guarded_step

COLUMNS = ("plain", "+ positions", "+ vision tensors", "attached")
_MEDIA = {"images": (True, False), "videos": (False, True), "both": (True, True)}
_MARKS = "<!-- waits -->", "<!-- /waits -->"

Row = dict[str, Any]


def run(configs: list[Path], json_file: Path | None, markdown_file: Path | None) -> None:
    """Count the waits of every config; print a table, and write it where asked.

    Args:
        configs: training configs; their `model.config` is used, with random weights.
        json_file: where to write the counts and the conditions.
        markdown_file: page in which the lines between `<!-- waits -->` and `<!-- /waits -->` are
            replaced by the table.
    """
    rows = [row for path in configs for row in count(load_config(path))]
    table = Table(*rows[0], title="host waits of a training step")
    for row in rows:
        table.add_row(*_cells(row))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if json_file is not None:
        report = {"conditions": conditions(), "rows": rows}
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if markdown_file is not None:
        before, _, rest = markdown_file.read_text(encoding="utf-8").partition(_MARKS[0])
        after = rest.partition(_MARKS[1])[2]
        page = f"{before}{_MARKS[0]}\n\n{markdown(rows)}\n\n{_MARKS[1]}{after}"
        markdown_file.write_text(page, encoding="utf-8")


def count(cfg: Config) -> Iterator[Row]:
    """Yield a row for each attention, media and padding."""
    kinds = _media(cfg.spec().family_row)
    for attention, media, padded in itertools.product(("sdpa", "eager"), kinds, (True, False)):
        model = cfg.model.model_copy(update={"attn_implementation": attention})
        yield count_row(cfg.model_copy(update={"model": model}), media, padded)


def count_row(cfg: Config, media: str, padded: bool) -> Row:
    """Return the waits of one step in each of the four ways, with what they were counted on."""
    torch.manual_seed(cfg.train.seed)
    model = build_model(cfg)
    plain, batch = _batches(cfg, media, padded)
    positions = plain | {"position_ids": batch["position_ids"]}
    counts: list[int | None]
    counts = [guarded_step(model, one).count for one in (plain, positions, batch)]
    known = cfg.spec().family in ALL_READERS
    counts.append(guarded_step(attach(model), batch).count if known else None)
    return {
        "family": cfg.spec().family,
        "attention": cfg.model.attn_implementation,
        "media": media,
        "padding": "yes" if padded else "no",
        **dict(zip(COLUMNS, counts, strict=True)),
    }


def _media(family: Family) -> list[str]:
    """Return what one batch of the plain model can hold."""
    if family.tower is not None and not family.tower.videos:
        return ["images"]
    # transformers 5.23 counts a GLM video's frames among the images, and refuses both together.
    return ["images", "videos"] if family.frames_as_images else list(_MEDIA)


def _cells(row: Row) -> list[str]:
    return ["-" if value is None else str(value) for value in row.values()]


def markdown(rows: list[Row]) -> str:
    """Return the rows of attached models as a Markdown table."""
    rows = [row for row in rows if row["attached"] is not None]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *map(_cells, rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _batches(cfg: Config, media: str, padded: bool) -> tuple[Row, Row]:
    """Return what an inner collate function makes, and the same with all that the stage adds."""
    spec = cfg.spec()
    images, videos = _MEDIA[media]
    examples = tiny_examples(model_table(cfg.model.config), spec, images=images, videos=videos)
    if not padded:
        examples = [examples[0]] * 2
    inner = PaddingCollator()
    collate = MRopeCollator(inner, spec, VisionSpec.from_config(cfg.model.config))
    return inner(examples), collate(examples)
