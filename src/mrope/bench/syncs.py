"""Count the host syncs of a training step: `mrope bench syncs`.

Runs one step, forward and backward, of the model of each config, on made-up batches of images,
videos or both, with padding and without, under sdpa and eager. Each step is counted four times:
with the plain model, with position ids in the batch, with the vision tensors too, and attached.
Nothing is timed, so that the counts are the same on every machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from mrope.bench.harness import conditions, make_console, write_json
from mrope.collate.collator import MRopeCollator
from mrope.collate.padding import PaddingCollator
from mrope.hf import attach
from mrope.hf.rows import ROWS
from mrope.proof.tiny_examples import tiny_examples
from mrope.spec.families import Family
from mrope.towers import VisionSpec
from mrope.training.config import load_config, model_table
from mrope.training.model import build_model
from mrope.training.sections import Config
from mrope.training.step import guarded_step

COLUMNS = ("plain", "+ positions", "+ vision tensors", "attached")
_MEDIA = {"images": (True, False), "videos": (False, True), "both": (True, True)}
_MARKS = "<!-- syncs -->", "<!-- /syncs -->"

Row = dict[str, Any]


def bench_syncs(configs: list[Path], json_file: Path | None, markdown_file: Path | None) -> None:
    """Count the syncs of every config, print a table, and write it to files if given.

    Args:
        configs: training configs; only the shape in `model.config` is used, with random weights.
        json_file: file for the counts and the conditions.
        markdown_file: page in which the table replaces the lines between `<!-- syncs -->` and
            `<!-- /syncs -->`.
    """
    rows = [row for path in configs for row in count_config(load_config(path))]
    table = Table(*rows[0], title="host syncs of a training step")
    for row in rows:
        table.add_row(*_cells(row))
    make_console().print(table)
    write_json({"conditions": conditions(), "rows": rows}, json_file)
    if markdown_file is not None:
        before, _, rest = markdown_file.read_text(encoding="utf-8").partition(_MARKS[0])
        after = rest.partition(_MARKS[1])[2]
        page = f"{before}{_MARKS[0]}\n\n{markdown(rows)}\n\n{_MARKS[1]}{after}"
        markdown_file.write_text(page, encoding="utf-8")


def count_config(cfg: Config) -> Iterator[Row]:
    """Yield a row for each combination of attention, media and padding."""
    kinds = _media(cfg.spec().family_row)
    for attention, media, padded in itertools.product(("sdpa", "eager"), kinds, (True, False)):
        model = cfg.model.model_copy(update={"attn_implementation": attention})
        yield count_row(cfg.model_copy(update={"model": model}), media, padded)


def count_row(cfg: Config, media: str, padded: bool) -> Row:
    """Return one row of the table: the case, and the syncs of its step in each of `COLUMNS`."""
    # Counts depend on shapes alone; the seed makes failures repeatable.
    torch.manual_seed(cfg.seed)
    model = build_model(cfg)
    plain, batch = _batches(cfg, media, padded)
    positions = plain | {"position_ids": batch["position_ids"]}
    counts: list[int | None]
    counts = [guarded_step(model, one).count for one in (plain, positions, batch)]
    attachable = cfg.spec().family in ROWS
    counts.append(guarded_step(attach(model), batch).count if attachable else None)
    return {
        "family": cfg.spec().family,
        "attention": cfg.model.attn_implementation,
        "media": media,
        "padding": "yes" if padded else "no",
        **dict(zip(COLUMNS, counts, strict=True)),
    }


def _media(family: Family) -> list[str]:
    """Return the names of the media that the plain model takes in one batch."""
    if family.tower is not None and not family.tower.videos:
        return ["images"]
    # transformers 5.23 counts the frames of a GLM video as images, and raises if a batch has both.
    return ["images", "videos"] if family.frames_as_images else list(_MEDIA)


def _cells(row: Row) -> list[str]:
    return ["-" if value is None else str(value) for value in row.values()]


def markdown(rows: list[Row]) -> str:
    """Return a Markdown table of the rows whose model can be attached."""
    rows = [row for row in rows if row["attached"] is not None]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *map(_cells, rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _batches(cfg: Config, media: str, padded: bool) -> tuple[Row, Row]:
    """Return a batch without the stage's tensors, and the same batch with them."""
    spec = cfg.spec()
    images, videos = _MEDIA[media]
    examples = tiny_examples(model_table(cfg.model.config), spec, images=images, videos=videos)
    if not padded:  # two equal rows need no padding
        examples = [examples[0]] * 2
    inner = PaddingCollator()
    collate = MRopeCollator(inner, spec, VisionSpec.from_config(cfg.model.config))
    return inner(examples), collate(examples)
