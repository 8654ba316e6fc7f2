"""Train as a config says, under transformers' `Trainer`: `mrope train`."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, set_seed

from mrope.collate.layouts import to_model_layout
from mrope.columns import NewColumns
from mrope.errors import MRopeError
from mrope.hf import SyncReport
from mrope.prepare.stop_together import host_group, on_every_rank
from mrope.training.arguments import training_arguments
from mrope.training.config import build_collator
from mrope.training.dataloader import (
    RowDataset,
    indexed,
    load_rows,
    make_loader,
    make_sampler,
    processor_folder,
    require_a_batch,
)
from mrope.training.model import add_adapter, attach_and_compile, build_model
from mrope.training.processor import load_processor
from mrope.training.rows import Rows, start_worker
from mrope.training.sections import Config


@dataclass(frozen=True)
class TrainResult:
    """Result of one run.

    Attributes:
        steps: optimizer steps that the run has made, those before it was resumed among them.
        losses: of each batch of this run, if it was watched.
        rope_index_calls: of the model's own `get_rope_index`; None: not counted, or it has none.
        positions_given: number of batches that came with `position_ids`.
        checkpoint: the last one of this run; None: nothing was saved.
        stopped: whether Ctrl-C ended the run.
        seconds: that training took, by `Trainer`.
        report: syncs of some steps; None: they were not watched.
    """

    steps: int
    losses: tuple[float, ...]
    rope_index_calls: int | None
    positions_given: int
    checkpoint: str | None
    stopped: bool
    seconds: float
    report: SyncReport | None


def train(cfg: Config, *, resume: bool = False, console: Console | None = None) -> TrainResult:
    """Train as a config says; checkpoints are transformers' own.

    Args:
        cfg: see `load_config`.
        resume: continue from the last checkpoint in `trainer.output_dir`.
        console: where to print; None: standard output.

    Raises:
        ConfigError: the config is not usable here.
        MRopeError: the dataset is not usable, a row is bad, or there is no checkpoint to resume.
    """
    console = console or Console(soft_wrap=True)
    arguments = training_arguments(cfg)
    # Before rows are opened and weights are loaded, which takes long.
    checkpoint = _checkpoint(arguments, resume)
    rows = _open_in_turn(cfg, arguments)
    result, trainer = run(cfg, arguments, rows, checkpoint)
    if trainer.is_world_process_zero():
        _print_end(result, console)
    return result


def run(
    cfg: Config,
    arguments: Any,
    rows: tuple[RowDataset, RowDataset | None],
    checkpoint: str | None = None,
    *,
    watched: bool = False,
) -> tuple[TrainResult, StageTrainer]:
    """Build the model, and train it on rows, with others to evaluate on.

    Args:
        cfg: the training config.
        arguments: as `training_arguments` returns them.
        rows: to train and to evaluate on.
        checkpoint: folder to resume from.
        watched: keep the losses, and count the model's calls of its own `get_rope_index`.
    """
    # Before the model: it draws random weights, and every run must draw the same.
    set_seed(arguments.seed)
    model = add_adapter(cfg, build_model(cfg))
    trainer = StageTrainer(cfg, attach_and_compile(cfg, model), arguments, rows)
    calls = _count_rope_index(model) if watched else None
    trainer.keeps_losses = watched
    report = _sync_report(trainer)
    with warnings.catch_warnings(), _stopping(trainer) as stop:
        # Pinning is the default everywhere; without a device torch says so for every loader.
        warnings.filterwarnings("ignore", "'pin_memory' argument is set as true but no")
        out = trainer.train(resume_from_checkpoint=checkpoint)
    if arguments.save_strategy != "no" and not stop.asked:
        trainer.save_model()
    result = TrainResult(
        steps=trainer.state.global_step,
        losses=tuple(torch.stack(trainer.losses).float().tolist() if trainer.losses else ()),
        rope_index_calls=calls[0] if calls else None,
        positions_given=trainer.positions_given,
        checkpoint=stop.saved,
        stopped=stop.asked,
        seconds=out.metrics["train_runtime"],
        report=report if report is not None and report.watched else None,
    )
    return result, trainer


class StageTrainer(Trainer):  # type: ignore[misc]
    """A `Trainer` over the rows, the collator and the batches that a config describes."""

    def __init__(
        self,
        cfg: Config,
        model: torch.nn.Module,
        arguments: object,
        rows: tuple[RowDataset, RowDataset | None],
    ) -> None:
        training, evaluation = (one and indexed(cfg, one) for one in rows)
        self.cfg, self.rows = cfg, rows[0]
        self.keeps_losses = False
        self.losses: list[torch.Tensor] = []
        self.positions_given = 0
        super().__init__(
            model,
            arguments,
            train_dataset=training,
            eval_dataset=evaluation,
            data_collator=build_collator(cfg),
            processing_class=_processing_class(cfg, rows[0]),
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the config: `Trainer`'s own, or batches up to a token budget."""
        if self.cfg.dataloader.max_tokens is None:
            require_a_batch(self.cfg, self.rows)
            own: DataLoader[Any] = super().get_train_dataloader()
            base = getattr(own, "base_dataloader", own)
            base.worker_init_fn = partial(start_worker, base.worker_init_fn)
            return own
        # Batches are those of this rank: accelerate alone would deal them out once more.
        prepared: DataLoader[Any] = prepare_data_loader(
            make_loader(self.cfg, self.rows, self.data_collator),
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
            non_blocking=self.accelerator.non_blocking,
        )
        return prepared

    def training_step(
        self, model: object, inputs: NewColumns, *args: object, **kwargs: object
    ) -> Any:
        """Run one batch, and keep its loss on the device."""
        self.positions_given += "position_ids" in inputs
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.keeps_losses:
            self.losses.append(loss)
        return loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        return super()._prepare_inputs(to_model_layout(inputs))


class _Stop(TrainerCallback):  # type: ignore[misc]
    """Save and stop at the end of the step at which a rank was asked to.

    Ranks tell one another by one gloo all-reduce of 4 bytes between the hosts' processors: no sync
    with the device, and all stop at the same step.
    """

    def __init__(self) -> None:
        self.asked = False
        self.saved: str | None = None
        self.has_ranks = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = host_group() if self.has_ranks else None

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        """Set what `Trainer` does next; called by it."""
        if self._group is not None:
            self.asked = not on_every_rank(not self.asked, self._group)
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Keep where the last checkpoint of this run is; called by `Trainer`."""
        self.saved = os.path.relpath(f"{args.output_dir}/checkpoint-{state.global_step}")


@contextmanager
def _stopping(trainer: StageTrainer) -> Iterator[_Stop]:
    """Let Ctrl-C end training at the end of its step; pressed twice, it ends the process."""
    stop = _Stop()
    trainer.add_callback(stop)

    def ask(number: int, _: object) -> None:
        # torchrun passes the signal on that the terminal has sent already.
        if stop.asked and not stop.has_ranks:
            signal.signal(number, previous)
            raise KeyboardInterrupt
        stop.asked = True

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def _checkpoint(arguments: Any, resume: bool) -> str | None:
    """Return the folder to resume from, which must be there."""
    given = arguments.resume_from_checkpoint
    if isinstance(given, str) and given.lower() not in ("true", "false"):
        if not Path(given).is_dir():
            raise MRopeError(f"trainer.resume_from_checkpoint: no folder at {given}")
        return given
    if not resume and str(given).lower() != "true":
        return None
    # The last whole one: its state is written last.
    states = Path(arguments.output_dir).glob("checkpoint-*/trainer_state.json")
    found = {int(state.parent.name.rpartition("-")[2]): str(state.parent) for state in states}
    if not found:
        raise MRopeError(
            f"trainer.output_dir: there is no checkpoint in {arguments.output_dir} to resume from"
        )
    return found[max(found)]


def _open_in_turn(cfg: Config, arguments: Any) -> tuple[RowDataset, RowDataset | None]:
    """Open the rows, and count them where batches have budgets: first in one process, for all."""
    with arguments.main_process_first(local=False, desc="opening rows"):
        rows = load_rows(cfg)
        if cfg.dataloader.max_tokens is not None and cfg.dataloader.buffer_size is None:
            make_sampler(cfg, rows, cfg.dataloader.max_tokens)
        if cfg.data.eval_source is None:
            return rows, None
        data = cfg.data.model_copy(update={"source": cfg.data.eval_source, "shape": None})
        return rows, load_rows(cfg.model_copy(update={"data": data}))


def _processing_class(cfg: Config, rows: RowDataset) -> Any:
    """Return what is saved beside the weights: the processor, or the demo's tokenizer."""
    if isinstance(rows, Rows) and rows.conversations is not None:
        processor = rows.conversations.processor
        return processor if rows.conversations.source is not None else processor.tokenizer
    folder = processor_folder(cfg)
    if folder is None:
        return None
    try:
        return load_processor(folder, cfg.model.trust_remote_code)
    except MRopeError as error:
        from transformers import AutoTokenizer

        auto: Any = AutoTokenizer
        warnings.warn(f"checkpoints get the tokenizer alone: {error}", UserWarning, stacklevel=2)
        return auto.from_pretrained(folder, local_files_only=True)


def _sync_report(trainer: StageTrainer) -> SyncReport | None:
    """Watch some steps. On a CPU, where the guard slows them down, one; or none."""
    on_cuda = trainer.args.device.type == "cuda"
    if not on_cuda and trainer.args.world_size > 1:
        return None
    report = SyncReport(steps=10 if on_cuda else 1, warmup=2, quiet=True)
    trainer.add_callback(report)
    return report


def _count_rope_index(model: torch.nn.Module) -> list[int]:
    """Return a list of the number of calls from now on; empty for a model without the method."""
    owners: list[Any] = [part for part in model.modules() if hasattr(part, "get_rope_index")]
    if not owners:
        return []
    calls = [0]
    # `...ForConditionalGeneration` passes the call on to its base model, which comes last here.
    own = owners[-1].get_rope_index

    def counted(*args: object, **kwargs: object) -> Any:
        calls[0] += 1
        return own(*args, **kwargs)

    owners[-1].get_rope_index = counted
    return calls


def _print_end(result: TrainResult, console: Console) -> None:
    where = "nothing was saved" if result.checkpoint is None else f"saved {result.checkpoint}"
    said = f"{result.steps} steps in {result.seconds:.0f} s; {where}"
    if result.stopped:
        said = f"stopped at step {result.steps}: {where}; mrope train ... --resume continues"
    console.print(said, highlight=False)
    report = result.report
    if report is not None and not result.stopped:
        console.print(report.table() if report.count else str(report), highlight=False)
