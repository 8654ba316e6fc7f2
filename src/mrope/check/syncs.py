"""Run `mrope syncs`: list the host syncs of a training step, plain and attached, side by side."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mrope.errors import MRopeError
from mrope.guard import Site
from mrope.hf import attach, detach
from mrope.training.config import build_collator, load_config
from mrope.training.dataloader import RowDataset
from mrope.training.loop import load_run_rows
from mrope.training.model import build_model
from mrope.training.sections import Config
from mrope.training.step import guarded_step, to_device


def print_step_syncs(config: Path | None, overrides: list[str], model: str | None) -> None:
    """Print every sync site of one training step, plain and attached, with its number of syncs.

    Args:
        config: training config with the model and the data.
        overrides: see `load_config`.
        model: instead of a config, a model's `config.json` or folder: random weights of that
            shape, on synthetic rows. Override a config's layer counts if the model is too large.

    Raises:
        MRopeError: neither or both of config and model are given, or the model is unknown.
    """
    if (config is None) == (model is None):
        raise MRopeError("give a CONFIG or --model, and not both")
    cfg = load_config(config, overrides) if config is not None else _synthetic_config(str(model))
    before, after = count_step_syncs(cfg)
    Console().print(_table(before, after))


def count_step_syncs(cfg: Config) -> tuple[list[Site], list[Site]]:
    """Count the sync sites of one step, forward and backward: plain, and attached."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(cfg.train.seed)
    rows = load_run_rows(cfg)
    model = build_model(cfg).to(device)
    found = []
    for attached in (False, True):
        rope = cfg.rope.model_copy(update={"enabled": attached, "vision": attached})
        batch = _first_batch(cfg.model_copy(update={"rope": rope}), rows)
        with ExitStack() as stack:
            if attached:
                attach(model)
                stack.callback(detach, model)
            found.append(guarded_step(model, to_device(batch, device)).sites)
    before, after = found
    return before, after


def _first_batch(cfg: Config, rows: RowDataset) -> dict[str, Any]:
    count = min(cfg.dataloader.batch_size, len(rows))
    batch: dict[str, Any] = build_collator(cfg)([rows[index] for index in range(count)])
    return batch


def _synthetic_config(model: str) -> Config:
    """Return a config of two synthetic rows for a model, each with two images and a clip."""
    shape = {"width": 160, "images": 2, "image": [8, 8], "videos": 1, "frames": 2, "frame": [8, 8]}
    return Config.model_validate(
        {
            "model": {"config": str(Path(model).resolve())},
            "data": {"source": "synthetic", "rows": 2, "shape": shape},
            "dataloader": {"batch_size": 2, "num_workers": 0},
        }
    )


def _table(before: list[Site], after: list[Site]) -> Table:
    """Return a table of both counts for each site, most syncs first."""
    table = Table("where", "what", "plain", "attached", title="host syncs of one training step")
    counts: dict[tuple[str, str], list[int]] = {}
    for column, sites in enumerate((before, after)):
        for site in sites:
            where = f"{site.file}:{site.line} {site.function}"
            counts.setdefault((where, site.op), [0, 0])[column] += site.count
    for (where, what), (plain, attached) in sorted(counts.items(), key=lambda item: -sum(item[1])):
        table.add_row(where, what, str(plain), str(attached))
    table.add_section()
    totals = [sum(site.count for site in sites) for sites in (before, after)]
    table.add_row("in all", "", *map(str, totals))
    return table
