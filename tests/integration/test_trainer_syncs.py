"""The settings of the docs that leave a step without syncs, under each trainer, by the guard."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import accelerate
import lightning
import pytest
import torch
import transformers
import trl
from accelerate.utils import DataLoaderConfiguration
from transformers import Trainer

import mrope
from integration.common import BATCH, build_processor, loader, optimizer, prepared, rows
from integration.test_lightning import QUIET
from integration.test_trl import FAMILY as SFT_FAMILY
from integration.test_trl import conversations, inner
from mrope.guard.sync_places import KNOWN, KnownPlace
from mrope.hf import SyncReport

FAMILY, STEPS, WARMUP = "qwen3_vl", 3, 2
ALL = WARMUP + STEPS + 1
RECIPE: dict[str, Any] = {
    "accelerator_config": {"non_blocking": True},
    "logging_nan_inf_filter": False,
}


def report() -> SyncReport:
    return SyncReport(STEPS, WARMUP, quiet=True)


def kinds(watch: SyncReport) -> set[str]:
    assert watch.watched == STEPS
    return set(watch.by_kind())


class WithoutMetrics(trl.SFTTrainer):  # type: ignore[misc]
    compute_loss = Trainer.compute_loss


def sft(kind: Any, folder: Path, **options: Any) -> SyncReport:
    model, collate = prepared("attached", SFT_FAMILY, inner())
    watch = report()
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": ALL,
        "per_device_train_batch_size": BATCH,
        "logging_steps": 500,
        "save_strategy": "no",
        "report_to": [],
        "bf16": False,
        "max_length": None,
        "dataloader_num_workers": 2,
    }
    kind(
        model=model,
        args=trl.SFTConfig(**{**arguments, **options}),
        train_dataset=conversations(),
        data_collator=collate,
        processing_class=build_processor(SFT_FAMILY),
        callbacks=[watch],
    ).train()
    return watch


def test_trl_reads_its_metrics_at_each_step(tmp_path: Path) -> None:
    assert kinds(sft(trl.SFTTrainer, tmp_path)) == {"copy", "trainer"}
    watch = sft(trl.SFTTrainer, tmp_path, **RECIPE)
    assert {place.function for place in watch.places} == {"compute_loss"}
    # Two comparisons and three reads.
    assert watch.per_step == 5


def test_trl_without_its_metrics_has_none(tmp_path: Path) -> None:
    watch = sft(WithoutMetrics, tmp_path, **RECIPE)
    assert kinds(watch) == set()


def with_accelerate(watch: SyncReport, *, non_blocking: bool, pin_memory: bool) -> None:
    accelerator = accelerate.Accelerator(
        gradient_accumulation_steps=2,
        dataloader_config=DataLoaderConfiguration(non_blocking=non_blocking),
    )
    model, collate = prepared("attached", FAMILY)
    examples = rows(FAMILY, count=2 * ALL * BATCH)
    batches = loader(examples, collate, pin_memory=pin_memory)
    model, step, batches = accelerator.prepare(model, optimizer(model), batches)
    with watch:
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                step.step()
                step.zero_grad()
            if accelerator.sync_gradients:
                watch.step()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"non_blocking": False, "pin_memory": True}, {"copy"}),
        ({"non_blocking": True, "pin_memory": False}, {"copy"}),
        ({"non_blocking": True, "pin_memory": True}, set()),
    ],
)
def test_accelerate_needs_both(options: Any, expected: set[str]) -> None:
    watch = report()
    with_accelerate(watch, **options)
    assert kinds(watch) == expected


class Module(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self, model: Any, watch: SyncReport, *, prog_bar: bool) -> None:
        super().__init__()
        self.model, self.watch, self.prog_bar = model, watch, prog_bar

    def training_step(self, batch: dict[str, Any]) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        self.log("loss", loss, prog_bar=self.prog_bar, batch_size=len(batch["rope_deltas"]))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer(self.model)

    def on_train_batch_end(self, *_: Any) -> None:
        self.watch.step()


@pytest.mark.parametrize(
    ("prog_bar", "pin_memory", "expected"),
    [(False, True, set()), (False, False, {"copy"}), (True, True, {"trainer"})],
)
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_lightning_needs_pinned_memory_alone(
    prog_bar: bool, pin_memory: bool, expected: set[str]
) -> None:
    watch = report()
    model, collate = prepared("attached", FAMILY)
    bar = {"enable_progress_bar": prog_bar}
    trainer = lightning.Trainer(
        max_steps=ALL, accelerator="cpu", log_every_n_steps=500, **{**QUIET, **bar}
    )
    batches = loader(rows(FAMILY, count=ALL * BATCH), collate, pin_memory=pin_memory)
    with watch:
        trainer.fit(Module(model, watch, prog_bar=prog_bar), batches)
    assert kinds(watch) == expected


class Once(torch.nn.Module):
    """A model whose second loss is NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        # No gradient: the weights stay finite.
        return {"loss": (self.weight * x).mean() + (float("nan") if self.calls == 2 else 0.0)}


@pytest.mark.parametrize("filtered", [True, False])
def test_without_the_filter_one_nan_stays_in_the_log(filtered: bool, tmp_path: Path) -> None:
    """The page says so: the Trainer resets its sum of losses by subtracting it from itself."""
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=6,
        logging_steps=1,
        logging_nan_inf_filter=filtered,
        save_strategy="no",
        report_to=[],
    )
    data: Any = [{"x": torch.ones(1)}] * 48
    trainer = Trainer(model=Once(), args=arguments, train_dataset=data)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [math.isnan(loss) for loss in logged] == [False] + [not filtered] * 5


@cache
def sources() -> list[Path]:
    roots = [Path(torch.__file__).parents[1], Path(mrope.__file__).parents[1]]
    names = ("torch", "transformers", "accelerate", "trl", "lightning", "mrope")
    return [file for root in roots for name in names for file in (root / name).rglob("*.py")]


@pytest.mark.parametrize(
    "known", [one for one in KNOWN if one.function], ids=lambda one: f"{one.path}:{one.function}"
)
def test_known_places_are_there(known: KnownPlace) -> None:
    """A release that renames a function would leave its row without an effect."""
    files = [file for file in sources() if known.matches(file.as_posix(), known.function)]
    assert any(f"def {known.function}(" in file.read_text("utf-8") for file in files)
