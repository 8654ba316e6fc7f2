"""Train as a config says, once, or twice to compare runs with and without the collator."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch.utils.data import DataLoader

from mrope.training.config import build_collator
from mrope.training.dataloader import RowDataset, make_loader, prepare_rows
from mrope.training.model import attach_and_compile, build_model, load_model_config
from mrope.training.result import Step, TrainResult
from mrope.training.sections import Config
from mrope.training.step import choose_device, guarded_step, to_device, train_steps
from mrope.training.tables import count_equal_losses, table_of_run, table_of_two_runs

# Sums of a padded batch, and of the same examples in one row, run in different order.
PACKED_TOLERANCE = 1e-4


def train(cfg: Config, console: Console | None = None) -> TrainResult:
    """Train as a config says, with a progress bar, and print a table at the end.

    Args:
        cfg: see `load_config`.
        console: where to print; None: standard output.

    Raises:
        ConfigError: the model's config is not usable here.
        MRopeError: the dataset is not usable, or a sample is malformed.
    """
    console = console or Console()
    choose_device(cfg.train.device)  # fails before rows are prepared, which takes long
    result = _train_once(cfg, load_run_rows(cfg), console)
    console.print(table_of_run(result))
    return result


def compare(cfg: Config, console: Console | None = None) -> bool:
    """Train twice from one seed, with `rope.enabled` on and off, and print both side by side.

    Returns:
        Whether every loss is equal: to the last bit, or with `rope.packing` within
        `PACKED_TOLERANCE`.

    Raises:
        ConfigError, MRopeError: as `train` does.
    """
    console = console or Console()
    on, off = compare_runs(cfg, console)
    tolerance = 0.0 if cfg.rope.packing is None else PACKED_TOLERANCE
    console.print(table_of_two_runs(on, off, tolerance))
    return count_equal_losses(on, off, tolerance) == len(on.steps)


def compare_runs(cfg: Config, console: Console) -> tuple[TrainResult, TrainResult]:
    """Return the results of two runs over the same rows: `rope.enabled` on, and off."""
    choose_device(cfg.train.device)
    # Once for both: preparing rows is slow, and both runs must read the same ones.
    rows = load_run_rows(cfg)
    on, off = (_train_once(_switched(cfg, enabled), rows, console) for enabled in (True, False))
    return on, off


def load_run_rows(cfg: Config) -> RowDataset:
    """Return the rows that a config trains on, as columns.

    Raises:
        ConfigError, MRopeError: as `train` does.
    """
    return prepare_rows(cfg, cfg.spec(), load_model_config(cfg))


def _switched(cfg: Config, enabled: bool) -> Config:
    """Return the config of one of two compared runs, with its own log file."""
    train = cfg.train
    # The second run would overwrite the log of the first.
    if train.log_file is not None:
        file = Path(train.log_file)
        name = f"{file.stem}.{'on' if enabled else 'off'}{file.suffix}"
        train = train.model_copy(update={"log_file": str(file.with_name(name))})
    rope = cfg.rope.model_copy(update={"enabled": enabled})
    return cfg.model_copy(update={"rope": rope, "train": train})


def _train_once(cfg: Config, rows: RowDataset, console: Console) -> TrainResult:
    # Before the model: it draws random weights, and both compared runs must draw the same.
    torch.manual_seed(cfg.train.seed)
    device = choose_device(cfg.train.device)
    model = build_model(cfg).to(device)
    trained = attach_and_compile(cfg, model)
    calls = _count_rope_index(model)
    loader = make_loader(cfg, rows, build_collator(cfg))
    steps = _run_steps(cfg, trained, loader, device, console)
    return TrainResult(
        rope_enabled=cfg.rope.enabled,
        steps=tuple(steps),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        rope_index_calls=calls[0] if calls else None,
        loop_pid=os.getpid(),
        # Evaluated last: its step calls get_rope_index too.
        syncs=_count_syncs(model, loader, device),
    )


def _run_steps(
    cfg: Config,
    model: torch.nn.Module,
    loader: DataLoader[Any],
    device: torch.device,
    console: Console,
) -> list[Step]:
    """Train a model, show the progress, and log each step where the config asks for it."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.train.lr, weight_decay=cfg.train.weight_decay
    )
    steps = []
    with ExitStack() as stack:
        log = _open_log(cfg, stack)
        progress = stack.enter_context(_progress(console))
        task = progress.add_task(_title(cfg), total=cfg.train.steps, loss=float("nan"))
        for step in train_steps(model, optimizer, loader, cfg.train.steps, device):
            steps.append(step)
            progress.update(task, advance=1, loss=step.loss)
            if log:
                log.write(json.dumps({**asdict(step), "rope_enabled": cfg.rope.enabled}) + "\n")
    return steps


def _count_syncs(model: torch.nn.Module, loader: DataLoader[Any], device: torch.device) -> int:
    """Return the syncs of one more step, forward and backward."""
    batch, _ = next(iter(loader))
    return guarded_step(model, to_device(batch, device)).count


def _count_rope_index(model: torch.nn.Module) -> list[int]:
    """Count the calls of the model's own `get_rope_index` from now on.

    Returns:
        A list of one count, which is updated in place; empty if no module has the method.
    """
    owners: list[Any] = [part for part in model.modules() if hasattr(part, "get_rope_index")]
    if not owners:
        return []
    calls = [0]
    # `...ForConditionalGeneration` passes the call on to its base model, which comes last here.
    own = owners[-1].get_rope_index

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return own(*args, **kwargs)

    owners[-1].get_rope_index = counted
    return calls


def _open_log(cfg: Config, stack: ExitStack) -> TextIO | None:
    if cfg.train.log_file is None:
        return None
    file = Path(cfg.train.log_file)
    # Before the first step, so that a path that cannot be written fails at once.
    file.parent.mkdir(parents=True, exist_ok=True)
    return stack.enter_context(file.open("w", encoding="utf-8"))


def _title(cfg: Config) -> str:
    return f"rope {'on' if cfg.rope.enabled else 'off'}"


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        console=console,
    )
