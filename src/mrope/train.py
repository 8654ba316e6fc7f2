"""The reference training loop, and the same run twice: positions from the workers, and without."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch.utils.data import DataLoader

from mrope import report
from mrope.config import Config, ConfigError, build_collator, model_table
from mrope.data import RowDataset, load_rows, make_loader
from mrope.errors import MRopeError
from mrope.guard import SyncGuard
from mrope.layouts import to_model_layout
from mrope.sampler import TokenBudgetSampler

# Losses of a padded batch and of the same examples in one row: sums run in another order.
PACKED_TOLERANCE = 1e-4
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        step: counted from 1.
        loss: as the model returned it.
        tokens: valid tokens of the batch.
        data_seconds: how long the loop waited for the batch.
        forward_seconds: how long `model(**batch)` took; on CUDA until the device is done.
        worker: id of the process that collated the batch.
        attached: whether the batch came with `position_ids`.
    """

    step: int
    loss: float
    tokens: int
    data_seconds: float
    forward_seconds: float
    worker: int
    attached: bool


@dataclass(frozen=True)
class TrainResult:
    """What a run did.

    Attributes:
        rope_enabled: whether the collator attached the positions.
        steps: in order.
        parameters: number of the model's parameters.
        rope_index_calls: how often the model called its own `get_rope_index`; None where it has no
            such method, so that nothing could be counted.
        loop_pid: id of the process that trained.
        waits: places where one more step, forward and backward, makes the host wait for a CUDA
            device, counted by `mrope.guard`.
    """

    rope_enabled: bool
    steps: tuple[Step, ...]
    parameters: int
    rope_index_calls: int | None
    loop_pid: int
    waits: int

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [step.loss for step in self.steps]

    @property
    def data_median(self) -> float:
        """Median seconds that a step waited for its batch."""
        return statistics.median(step.data_seconds for step in self.steps)

    @property
    def forward_median(self) -> float:
        """Median seconds of a step's forward."""
        return statistics.median(step.forward_seconds for step in self.steps)


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


def load_model_config(cfg: Config) -> Any:
    """Return the live transformers config of `model.config`.

    Raises:
        ConfigError: transformers has no class for the model, and the folder does not carry one.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    table = dict(model_table(cfg.model.config))
    carried = _carries_code(cfg, table)
    if table.get("model_type") not in CONFIG_MAPPING and not carried:
        raise ConfigError(_no_class(table))
    if isinstance(cfg.model.config, str):
        return AutoConfig.from_pretrained(
            cfg.model.config, local_files_only=True, trust_remote_code=carried
        )
    return AutoConfig.for_model(**table)


def build_model(cfg: Config) -> torch.nn.Module:
    """Return the model in training mode: weights of the folder where it has some, else random.

    Raises:
        ConfigError: as `load_model_config` does.
    """
    from transformers import AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText
    options: dict[str, Any] = {
        "attn_implementation": cfg.model.attn_implementation,
        "dtype": getattr(torch, cfg.train.dtype),
        "trust_remote_code": _carries_code(cfg, model_table(cfg.model.config)),
    }
    if _has_weights(cfg.model.config):
        model = auto.from_pretrained(cfg.model.config, local_files_only=True, **options)
    else:
        model = auto.from_config(load_model_config(cfg), **options)
    trained: torch.nn.Module = model.train()
    return trained


def _carries_code(cfg: Config, table: Mapping[str, Any]) -> bool:
    folder = isinstance(cfg.model.config, str) and Path(cfg.model.config).is_dir()
    return folder and cfg.model.trust_remote_code and "auto_map" in table


def _no_class(table: Mapping[str, Any]) -> str:
    import transformers

    if "auto_map" in table:
        hint = "its folder carries one: set model.trust_remote_code: true to run that code"
    else:
        hint = (
            "train with a framework that has it (build_collator(cfg) gives its collator), or name "
            "a folder that carries the class"
        )
    return (
        f"model.config: transformers {transformers.__version__} has no class for model_type "
        f"{table.get('model_type')!r}; {hint}"
    )


def _has_weights(config: Any) -> bool:
    if not isinstance(config, str) or not Path(config).is_dir():
        return False
    return any(next(Path(config).glob(pattern), None) for pattern in _WEIGHTS)


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


def guarded_step(model: torch.nn.Module, batch: Mapping[str, Any]) -> SyncGuard:
    """Return the guard of one step, forward and backward; gradients are set anew."""
    model.zero_grad()
    with SyncGuard() as guard:
        model(**batch).loss.backward()
    return guard


def _steps(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[Any],
    count: int,
    device: torch.device,
) -> Iterator[Step]:
    """Train for `count` steps and yield each when it is done."""
    batches = endless(loader)
    for number in range(1, count + 1):
        start = time.perf_counter()
        batch, worker = next(batches)
        data_seconds = time.perf_counter() - start
        mask = batch.get("attention_mask")
        tokens = batch["input_ids"].numel() if mask is None else int(mask.sum())
        attached = "position_ids" in batch
        batch = to_device(batch, device)
        start = time.perf_counter()
        loss = model(**batch).loss
        finish(device)
        forward_seconds = time.perf_counter() - start
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield Step(number, loss.item(), tokens, data_seconds, forward_seconds, worker, attached)


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the batch as a model takes it, its tensors on the device; ints stay on the host."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in to_model_layout(batch).items()
    }


def endless(loader: DataLoader[Any]) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield batches and the process that made each, pass after pass."""
    for number in itertools.count():
        if isinstance(loader.batch_sampler, TokenBudgetSampler):
            loader.batch_sampler.set_epoch(number)
        yield from loader


def finish(device: torch.device) -> None:
    """Wait for a CUDA device to be done; others are."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise MRopeError("train.device is cuda, but torch sees no CUDA device")
    return torch.device(name)


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
