"""Real trainers take padding-free batches from this collator, and get the losses of padded ones.

Run by `make integration`, in an environment of its own: TRL brings requirements that the library
does not have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers

from mrope import MRopeCollator, VisionSpec
from mrope.hf import attach
from mrope.training.demo.tokenizer import build_tokenizer
from support.models import model_config, tiny_examples, tiny_model, tiny_spec

STEPS = 10
ATOL = 1e-4


def examples(family: str) -> list[dict[str, Any]]:
    """Examples with images and clips, one in three of text alone."""
    made: list[dict[str, Any]] = []
    for seed in range(7):
        made += tiny_examples(family, rows=2, seed=seed)
        made += tiny_examples(family, images=False, videos=False, rows=1, seed=seed)
    return made


def collator(family: str, packing: Any) -> MRopeCollator:
    vision = VisionSpec.from_config(model_config(family))
    return MRopeCollator(None, tiny_spec(family), vision, packing=packing)


def options(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,  # which SFTConfig would choose; the losses are compared in float32
        "dataloader_num_workers": 2,
        "seed": 0,
    }


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_trainer(family: str, attached: bool, tmp_path: Path) -> None:
    found = []
    for packing in (None, "flatten"):
        model = tiny_model(family).train()
        trainer = transformers.Trainer(
            model=attach(model) if attached else model,
            args=transformers.TrainingArguments(**options(tmp_path)),
            train_dataset=examples(family),
            data_collator=collator(family, packing),
        )
        found.append(losses(trainer))
    padded, flat = found
    assert len(flat) == STEPS and flat[0] != flat[-1]
    torch.testing.assert_close(torch.tensor(flat), torch.tensor(padded), rtol=0, atol=ATOL)


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_trl_sft_trainer(family: str, attached: bool, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    table = datasets.Dataset.from_list(
        [
            {name: torch.as_tensor(value).tolist() for name, value in one.items()}
            for one in examples(family)
        ]
    )
    found = []
    for packing in (None, "flatten"):
        model = tiny_model(family).train()
        trainer = trl.SFTTrainer(
            model=attach(model) if attached else model,
            args=trl.SFTConfig(
                **options(tmp_path),
                max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True},
                remove_unused_columns=False,  # SFTTrainer knows no columns of pixels and grids
            ),
            train_dataset=table,
            data_collator=collator(family, packing),
            processing_class=build_tokenizer(),
        )
        found.append(losses(trainer))
    padded, flat = found
    assert len(flat) == STEPS and flat[0] != flat[-1]
    torch.testing.assert_close(torch.tensor(flat), torch.tensor(padded), rtol=0, atol=ATOL)
