"""`equip`: transformers' Trainer with the stage in one call, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from mrope import MRopeCollator, MRopeError, MRopeSpec, VisionSpec
from mrope.collate.padding import PaddingCollator
from mrope.hf import SyncReport, attach, equip
from mrope.hf.attaching import is_attached
from support.models import media_of, model_config, tiny_examples, tiny_model, tiny_spec

STEPS = 3


def make(folder: Path, model: Any = None, kind: type = Trainer, **options: Any) -> Any:
    family = options.pop("family", "qwen3_vl")
    names = ("data_collator", "model_init")
    given: dict[str, Any] = {name: options.pop(name) for name in names if name in options}
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    if "model_init" not in given:
        given["model"] = tiny_model(family).train() if model is None else model
    rows = options.pop("rows", None) or tiny_examples(family, rows=9, **media_of(family)[0])
    arguments = TrainingArguments(str(folder), **{**settings, **options})
    return kind(args=arguments, train_dataset=rows, **{"data_collator": PaddingCollator(), **given})


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [one["loss"] for one in trainer.state.log_history if "loss" in one]


def collator(family: str = "qwen3_vl", **options: Any) -> MRopeCollator:
    vision = VisionSpec.from_config(model_config(family))
    return MRopeCollator(None, tiny_spec(family), vision, **options)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v"])
def test_losses_are_equal(family: str, tmp_path: Path) -> None:
    plain = losses(make(tmp_path, family=family))
    assert losses(equip(make(tmp_path, family=family), quiet=True)) == pytest.approx(
        plain, abs=1e-5
    )


def test_no_step_syncs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the plain trainer's many; one that logs at each step has two left, which are named."""
    counts = {}
    for name in ("plain", "logs", "quiet"):
        trainer = make(tmp_path, max_steps=5, logging_steps=1 if name == "logs" else 500)
        trainer.add_callback(report := SyncReport(3, 1, quiet=True))
        (trainer if name == "plain" else equip(trainer)).train()
        counts[name] = report.per_step
    assert counts["plain"] > 50
    assert counts["quiet"] == 0
    assert 0 < counts["logs"] <= 3
    assert "logging_steps=1 reads two numbers" in capsys.readouterr().out


def test_five_lines_say_what_was_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    equip(make(tmp_path, logging_steps=500))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0] == "mrope.hf.equip: Trainer"
    assert "PaddingCollator, with positions of qwen3_vl as transformers-5.23" in lines[1]
    assert "Qwen3VLForConditionalGeneration attached; Qwen3VLVisionModel: " in lines[2]
    assert "accelerator_config.non_blocking=True, logging_nan_inf_filter=False" in lines[3]
    assert lines[4] == "  still syncs: nothing known"


def test_options_of_the_stage_are_passed_on(tmp_path: Path) -> None:
    trainer = equip(make(tmp_path), quiet=True, packing="flatten")
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["position_ids"].shape[:2] == (4, 1)
    assert losses(trainer) == pytest.approx(losses(make(tmp_path)), abs=1e-5)


def test_evaluation_takes_the_stage_too(tmp_path: Path) -> None:
    rows = tiny_examples("qwen3_vl", rows=4)
    plain, equipped = make(tmp_path), equip(make(tmp_path), quiet=True)
    ours, theirs = (one.evaluate(rows)["eval_loss"] for one in (equipped, plain))
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert "image_scatter_index" in next(iter(equipped.get_eval_dataloader(rows)))


def test_a_default_collator_gives_way_to_padding(tmp_path: Path) -> None:
    trainer = equip(make(tmp_path, data_collator=None), quiet=True)
    assert losses(trainer) == pytest.approx(losses(make(tmp_path)), abs=1e-5)


def test_what_was_done_by_hand_stays(tmp_path: Path) -> None:
    own = collator()
    trainer = make(tmp_path, attach(tiny_model("qwen3_vl").train()), data_collator=own)
    assert equip(equip(trainer, quiet=True), quiet=True).data_collator is own


def test_a_frozen_reference_is_attached_too(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.ref_model = tiny_model("qwen3_vl")
    equip(trainer, quiet=True)
    assert is_attached(trainer.ref_model)


class Rows(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(tiny_examples("qwen3_vl", rows=9))


def test_batches_of_a_stream_are_not_dispatched(tmp_path: Path) -> None:
    trainer = equip(make(tmp_path, rows=Rows()), quiet=True)
    assert trainer.accelerator.dispatch_batches is False
    assert len(losses(trainer)) == STEPS


class Metrics(Trainer):  # type: ignore[misc]
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


def test_a_loss_of_its_own_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    equip(make(tmp_path, kind=Metrics, dataloader_pin_memory=False))
    last = capsys.readouterr().out.splitlines()[-1]
    assert "compute_loss of Metrics may read metrics" in last
    assert "dataloader_pin_memory=False" in last


class Generates(Trainer):  # type: ignore[misc]
    def _generate_and_score_completions(self) -> None: ...


class Numbers(PaddingCollator):
    return_position_ids = True


def other_merge() -> MRopeCollator:
    spec = MRopeSpec.from_config(model_config("qwen2_vl"), "transformers-5.23")
    return MRopeCollator(None, spec, VisionSpec.from_config(model_config("qwen2_vl")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": Generates}, "makes its batches behind its collator"),
        ({"model_init": lambda: tiny_model("qwen3_vl")}, "makes a new model by model_init"),
        ({"data_collator": Numbers()}, "Numbers numbers tokens itself"),
        ({"data_collator": other_merge()}, "is a MRopeCollator with spec="),
        ({"data_collator": MRopeCollator(None, tiny_spec("qwen3_vl"))}, "with vision=None"),
        ({"accelerator_config": {"split_batches": True}}, "cut on their first dimension"),
        ({"model": torch.nn.Linear(2, 2)}, "holds 0 base models"),
    ],
)
def test_what_would_differ_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trainer = make(tmp_path, **options)
    before = trainer.data_collator
    with pytest.raises(MRopeError, match=message):
        equip(trainer, quiet=True)
    assert trainer.data_collator is before


def test_too_late_and_no_trainer(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.model_wrapped = torch.nn.Sequential(trainer.model)
    with pytest.raises(MRopeError, match="has wrapped its model already"):
        equip(trainer)
    with pytest.raises(MRopeError, match="takes a transformers Trainer"):
        equip(tiny_model("qwen3_vl"))
    with pytest.raises(MRopeError, match="give packing to that"):
        equip(make(tmp_path, data_collator=collator()), packing="flatten")


def test_positions_that_a_collator_makes_are_refused_at_the_first_batch(tmp_path: Path) -> None:
    def numbers(examples: Any) -> Any:
        batch = PaddingCollator()(examples)
        batch["position_ids"] = torch.zeros_like(batch["input_ids"])
        return batch

    with pytest.raises(MRopeError, match="position_ids"):
        losses(equip(make(tmp_path, data_collator=numbers), quiet=True))
