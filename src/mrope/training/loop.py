"""The reference training loop, and the same run twice: positions from the workers, and without."""

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

from mrope.training import tables as report
from mrope.training.config import build_collator
from mrope.training.dataloader import RowDataset, load_rows, make_loader
from mrope.training.model import build_model, load_model_config
from mrope.training.result import TrainResult
from mrope.training.sections import Config
from mrope.training.step import _device, _steps, guarded_step, to_device

# Losses of a padded batch and of the same examples in one row: sums run in another order.
PACKED_TOLERANCE = 1e-4


def train(cfg: Config, console: Console | None = None) -> TrainResult:
    """Train as a config says; show a progress bar, and a table at the end.

    Args:
        cfg: see `load_config`.
        console: where to print; None: standard output.

    Raises:
        ConfigError: the model's config is not usable here.
        MRopeError: the dataset is not usable, or a sample is malformed.
    """
    console = console or Console()
    result = _run(cfg, load_run_rows(cfg), console)
    console.print(report.one_run(result))
    return result


def compare(cfg: Config, console: Console | None = None) -> bool:
    """Train twice from one seed, with `rope.enabled` on and off; show both runs side by side.

    Returns:
        Whether every loss is equal: to the last bit, or to `PACKED_TOLERANCE` where one of the runs
        has its examples in one row.

    Raises:
        ConfigError, MRopeError: as `train` does.
    """
    console = console or Console()
    on, off = compare_runs(cfg, console)
    tolerance = 0.0 if cfg.rope.packing is None else PACKED_TOLERANCE
    console.print(report.two_runs(on, off, tolerance))
    return report.equal_losses(on, off, tolerance) == len(on.steps)


def compare_runs(cfg: Config, console: Console) -> tuple[TrainResult, TrainResult]:
    """Return the results of the two runs, on and off, over the same rows."""
    rows = load_run_rows(cfg)
    on, off = (_run(_switched(cfg, enabled), rows, console) for enabled in (True, False))
    return on, off


def load_run_rows(cfg: Config) -> RowDataset:
    """Return the rows that a config's run reads."""
    return load_rows(cfg, cfg.spec(), load_model_config(cfg))


def _switched(cfg: Config, enabled: bool) -> Config:
    """Return the config of one of two compared runs, with a log file of its own."""
    train = cfg.train
    if train.log_file is not None:
        file = Path(train.log_file)
        name = f"{file.stem}.{'on' if enabled else 'off'}{file.suffix}"
        train = train.model_copy(update={"log_file": str(file.with_name(name))})
    rope = cfg.rope.model_copy(update={"enabled": enabled})
    return cfg.model_copy(update={"rope": rope, "train": train})


def _run(cfg: Config, rows: RowDataset, console: Console) -> TrainResult:
    torch.manual_seed(cfg.train.seed)
    device = _device(cfg.train.device)
    model = build_model(cfg).to(device)
    if cfg.model.attach and cfg.rope.enabled:
        from mrope.hf import attach

        attach(model)
    calls = _count_rope_index(model)
    loader = make_loader(cfg, rows, build_collator(cfg))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.train.lr, weight_decay=cfg.train.weight_decay
    )
    with ExitStack() as stack:
        log = _open_log(cfg, stack)
        progress = stack.enter_context(_progress(console))
        task = progress.add_task(_title(cfg), total=cfg.train.steps, loss=float("nan"))
        steps = []
        for step in _steps(model, optimizer, loader, cfg.train.steps, device):
            steps.append(step)
            progress.update(task, advance=1, loss=step.loss)
            if log:
                log.write(json.dumps({**asdict(step), "rope_enabled": cfg.rope.enabled}) + "\n")
    return TrainResult(
        rope_enabled=cfg.rope.enabled,
        steps=tuple(steps),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        rope_index_calls=calls[0] if calls else None,
        loop_pid=os.getpid(),
        waits=_count_waits(model, loader, device),
    )


def _count_waits(model: torch.nn.Module, loader: DataLoader[Any], device: torch.device) -> int:
    batch, _ = next(iter(loader))
    return guarded_step(model, to_device(batch, device)).count


def _count_rope_index(model: torch.nn.Module) -> list[int]:
    """Count the calls of the model's own `get_rope_index` from now on.

    Returns:
        A list of one number, which grows; empty where no module has the method.
    """
    owners: list[Any] = [part for part in model.modules() if hasattr(part, "get_rope_index")]
    if not owners:
        return []
    calls = [0]
    # The last one is the innermost: others hand the call on to it.
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
