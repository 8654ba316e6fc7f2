"""`equip` with TRL's trainers, as they are made: losses equal, and what is left that syncs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from transformers.modeling_layers import GenericForSequenceClassification

from hf.test_heads import classifier
from integration.common import BATCH, STEPS, build_processor
from integration.test_trl import FAMILY, conversations
from mrope.hf import SyncReport, equip
from mrope.hf.attaching import is_attached
from support.models import tiny_model

SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": BATCH,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "bf16": False,
    "max_length": None,
}


def preferences() -> Any:
    """Conversations of one picture with a chosen and a rejected answer."""

    def split(row: dict[str, Any]) -> dict[str, Any]:
        prompt, answer = row["messages"][:1], row["messages"][1:2]
        text = answer[0]["content"][-1]["text"]
        other = [{"role": "assistant", "content": [{"type": "text", "text": text[::-1]}]}]
        texts = [part for part in prompt[0]["content"] if part["type"] == "text"]
        prompt = [{"role": "user", "content": texts[0]["text"]}]
        chosen = [{"role": "assistant", "content": text}]
        return {
            "prompt": prompt,
            "chosen": chosen,
            "rejected": [{**other[0], "content": text[::-1]}],
        }

    table = conversations().filter(lambda row: len(row["images"]) > 0)
    return table.map(split, remove_columns=["messages"])


def texts() -> Any:
    """Preferences without pictures, which TRL's reward trainer takes alone."""
    return preferences().remove_columns("images")


def make_reward(folder: Path, **options: Any) -> Any:
    model = classifier(GenericForSequenceClassification, tiny_model(FAMILY), labels=1)
    settings = {**SETTINGS, "disable_dropout": True, **options}
    return trl.RewardTrainer(
        model=model.train(),
        args=trl.RewardConfig(output_dir=str(folder), **settings),
        train_dataset=texts(),
        processing_class=build_processor(FAMILY).tokenizer,
    )


def make(kind: str, folder: Path, **options: Any) -> Any:
    if kind == "reward":
        return make_reward(folder, **options)
    classes = {"sft": (trl.SFTTrainer, trl.SFTConfig), "dpo": (trl.DPOTrainer, trl.DPOConfig)}
    trainer, config = classes[kind]
    # Without one TRL would load the reference from the folder that the model came from.
    reference = {"ref_model": tiny_model(FAMILY)} if kind == "dpo" else {}
    return trainer(
        **reference,
        model=tiny_model(FAMILY).train(),
        args=config(output_dir=str(folder), **{**SETTINGS, **options}),
        train_dataset=conversations() if kind == "sft" else preferences(),
        processing_class=build_processor(FAMILY),
    )


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [one["loss"] for one in trainer.state.log_history if "loss" in one]


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_losses_are_equal(kind: str, tmp_path: Path) -> None:
    plain = losses(make(kind, tmp_path))
    trainer = equip(make(kind, tmp_path), quiet=True)
    assert len(plain) == STEPS
    assert losses(trainer) == pytest.approx(plain, abs=1e-4)
    assert is_attached(trainer.ref_model if kind == "dpo" else trainer.model)


@pytest.mark.parametrize(("kind", "most"), [("sft", 5), ("dpo", 40), ("reward", 20)])
def test_what_is_left_is_the_trainers_own_metrics(
    kind: str, most: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = equip(make(kind, tmp_path, logging_steps=500))
    trainer.add_callback(report := SyncReport(2, 2, quiet=True))
    trainer.train()
    assert 0 < report.per_step <= most
    assert all("/trl/" in place.file for place in report.places), report
    assert "may read metrics" in capsys.readouterr().out
