"""`mrope syncs`: where a training step makes the host wait, before and after, side by side."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mrope.errors import MRopeError
from mrope.guard.sync_guard import Site
from mrope.hf import attach, detach
from mrope.training.config import build_collator, load_config
from mrope.training.dataloader import RowDataset
from mrope.training.loop import load_run_rows
from mrope.training.model import build_model
from mrope.training.sections import Config
from mrope.training.step import guarded_step, to_device


def run(config: Path | None, overrides: list[str], model: str | None) -> None:
    """Print every waiting site of one training step, plain and attached, with how often it waits.

    Args:
        config: training config, whose model and data are used.
        overrides: as `load_config` takes them.
        model: instead of a config, a model's `config.json` or folder: random weights in its shape,
            on made-up rows. Large models are cut to a few layers by overriding the config.

    Raises:
        MRopeError: neither or both of config and model are given, or the model is not known.
    """
    if (config is None) == (model is None):
        raise MRopeError("give a CONFIG or --model, and not both")
    cfg = load_config(config, overrides) if config is not None else _made_up(str(model))
    before, after = step_sites(cfg)
    Console().print(_table(before, after))


def step_sites(cfg: Config) -> tuple[list[Site], list[Site]]:
    """Return the waiting sites of one step, forward and backward: plain, and attached."""
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


def _made_up(model: str) -> Config:
    """Return a config of made-up rows for a model: two rows of two images and a clip each."""
    shape = {"width": 160, "images": 2, "image": [8, 8], "videos": 1, "frames": 2, "frame": [8, 8]}
    return Config.model_validate(
        {
            "model": {"config": str(Path(model).resolve())},
            "data": {"source": "synthetic", "rows": 2, "shape": shape},
            "dataloader": {"batch_size": 2, "num_workers": 0},
        }
    )


def _table(before: list[Site], after: list[Site]) -> Table:
    """Return both counts for each site, most frequent first."""
    table = Table("where", "what", "plain", "attached", title="waits of one training step")
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
