"""Run `mrope syncs`: list the host syncs of a training step, or of transformers' Trainer."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mrope.columns import NewColumns
from mrope.errors import MRopeError
from mrope.guard import Site
from mrope.guard.sync_places import place_cells
from mrope.hf import SyncReport, attach, detach
from mrope.training.config import as_config, build_collator, load_config
from mrope.training.dataloader import RowDataset, load_rows
from mrope.training.model import attach_and_compile, build_model
from mrope.training.sections import Config
from mrope.training.step import guarded_step, to_device

# What transformers' Trainer needs to run without syncs; docs/start/trainer.md says what
# each setting gives up.
TRAINER_RECIPE: NewColumns = {
    "accelerator_config": {"non_blocking": True},
    "dataloader_pin_memory": True,
    "logging_nan_inf_filter": False,
    "include_num_input_tokens_seen": "no",
    "logging_steps": 500,
}


def print_step_syncs(config: Path | None, overrides: list[str], model: str | None) -> None:
    """Print every sync site of one training step, plain and attached, with its number of syncs.

    Args:
        config: training config with the model and the data.
        overrides: see `load_config`.
        model: instead of a config, a model's `config.json` or folder: random weights of that
            shape, on synthetic rows. A model that is too large takes a config whose `model.config`
            has fewer layers.

    Raises:
        MRopeError: neither or both of config and model are given, or the model is unknown.
    """
    before, after = count_step_syncs(_config(config, overrides, model))
    console = Console()
    console.print(_table(before, after, console.width))


def print_trainer_syncs(config: Path | None, overrides: list[str], model: str | None) -> None:
    """Print the syncs of transformers' Trainer with an attached model, by place.

    Twice: with the Trainer's defaults, and with `TRAINER_RECIPE`.

    Args:
        config, overrides, model: see `print_step_syncs`.

    Raises:
        MRopeError: as `print_step_syncs`, or accelerate is not installed.
    """
    cfg = _config(config, overrides, model)
    # Attached, as a user would train: `print_step_syncs` shows what the model alone syncs.
    model_on = cfg.model.model_copy(update={"attach": True})
    rope_on = cfg.rope.model_copy(update={"enabled": True, "vision": True})
    cfg = cfg.model_copy(update={"model": model_on, "rope": rope_on})
    console = Console()
    for name, options in (("defaults", {}), ("with these settings:", TRAINER_RECIPE)):
        report = SyncReport(quiet=True)
        run_trainer(cfg, options, report)
        console.print(f"transformers' Trainer, {name}", *(f"{k}={v!r}" for k, v in options.items()))
        console.print(report.table(console.width))


def run_trainer(cfg: Config, options: NewColumns, report: SyncReport) -> float:
    """Train under transformers' Trainer for the steps that a report asks for; return the mean loss.

    Batches have `dataloader.batch_size` rows: the Trainer takes no token budget.

    Args:
        cfg: training config with the model and the data.
        options: of `TrainingArguments`.
        report: a callback of the run; afterwards it has what was counted.

    Raises:
        MRopeError: accelerate is not installed.
    """
    from transformers import Trainer, TrainingArguments
    from transformers.utils import is_accelerate_available

    if not is_accelerate_available():
        raise MRopeError("transformers' Trainer needs accelerate; pip install accelerate")
    torch.manual_seed(cfg.seed)
    # Only beside a CUDA device: it also turns `dataloader_pin_memory` off.
    on_cpu = torch.cuda.is_available() and bool(cfg.trainer.get("use_cpu"))
    with tempfile.TemporaryDirectory() as folder, report:
        arguments = TrainingArguments(
            folder,
            max_steps=report.warmup + report.steps,
            per_device_train_batch_size=cfg.dataloader.batch_size,
            dataloader_num_workers=cfg.dataloader.num_workers,
            learning_rate=cfg.trainer.get("learning_rate", 5e-5),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=on_cpu,
            **options,
        )
        trainer = Trainer(
            model=attach_and_compile(cfg, build_model(cfg)),
            args=arguments,
            train_dataset=load_rows(cfg),
            data_collator=build_collator(cfg),
            callbacks=[report],
        )
        return float(trainer.train().training_loss)


def _config(config: Path | None, overrides: list[str], model: str | None) -> Config:
    if (config is None) == (model is None):
        raise MRopeError("give a CONFIG or --model, and not both")
    if config is not None:
        return load_config(config, overrides)
    if overrides:
        raise MRopeError(f"--model takes no {overrides[0]}: overrides change a CONFIG")
    return _synthetic_config(str(model))


def count_step_syncs(cfg: Config) -> tuple[list[Site], list[Site]]:
    """Count the sync sites of one step, forward and backward: plain, and attached."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(cfg.seed)
    rows = load_rows(cfg)
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


def _first_batch(cfg: Config, rows: RowDataset) -> NewColumns:
    count = min(cfg.dataloader.batch_size, len(rows))
    batch: NewColumns = build_collator(cfg)([rows[index] for index in range(count)])
    return batch


def _synthetic_config(model: str) -> Config:
    """Return a config of two synthetic rows for a model, each with two images and maybe a clip."""
    shape = {"width": 160, "images": 2, "image": [8, 8], "frames": 2, "frame": [8, 8]}
    table = {
        "model": {"config": model},
        "data": {"source": "synthetic", "rows": 2, "shape": shape},
        "dataloader": {"batch_size": 2, "num_workers": 0},
    }
    row = as_config(table, Path(), "--model").spec().family_row
    # transformers' GLM-V counts the frames of clips as images of the same batch, and raises.
    shape["videos"] = int(row.has_videos and not row.frames_as_images)
    return as_config(table, Path(), "--model")


def _table(before: list[Site], after: list[Site], width: int) -> Table:
    """Return a table of both counts for each site, most syncs first."""
    table = Table(title="host syncs of one training step")
    # Folded, not cut: a place without its line number is of no use.
    for heading in ("where", "what", "plain", "attached"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "where")
    counts: dict[tuple[str, str], list[int]] = {}
    for column, sites in enumerate((before, after)):
        for site in sites:
            file = "/".join(Path(site.file).parts[-2:])
            where = f"{file}:{site.line} {site.function}"
            counts.setdefault((where, site.op), [0, 0])[column] += site.count
    rows = sorted(counts.items(), key=lambda item: -sum(item[1]))
    cells = place_cells([where for (where, _), _ in rows], width)
    for cell, ((_, what), (plain, attached)) in zip(cells, rows, strict=True):
        table.add_row(cell, what, str(plain), str(attached))
    table.add_section()
    totals = [sum(site.count for site in sites) for sites in (before, after)]
    table.add_row("in all", "", *map(str, totals))
    return table
