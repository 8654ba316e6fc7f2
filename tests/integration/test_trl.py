"""TRL's SFTTrainer on photographs: its own vision collator makes the batch, ours adds to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from integration.common import (
    BATCH,
    STEPS,
    assert_equal_losses,
    build_processor,
    collator,
    prepared,
)
from mrope import SpanMismatchError
from mrope.collate.collator import Collate
from mrope.training.demo.dataset import photographs

# The config of `make demo`, whose token ids are those of the demo's tokenizer.
FAMILY = "demo"


def conversations() -> datasets.Dataset:
    """Conversations about one photograph, several, and none."""
    table = photographs(30)
    return table.filter(lambda row: not row["videos"]).remove_columns(["videos", "fps"])


def prompts() -> datasets.Dataset:
    """The same conversations, split into a prompt and its completion."""

    def split(row: dict[str, Any]) -> dict[str, Any]:
        # Plain texts, since a completion has no pictures; TRL puts those of the prompt in front.
        prompt, completion = (
            [{"role": message["role"], "content": message["content"][-1]["text"]}]
            for message in row["messages"]
        )
        return {"prompt": prompt, "completion": completion}

    return conversations().map(split, remove_columns=["messages"])


def inner(**options: Any) -> DataCollatorForVisionLanguageModeling:
    return DataCollatorForVisionLanguageModeling(build_processor(FAMILY), **options)


def train(model: Any, collate: Collate, table: datasets.Dataset, folder: Path) -> list[float]:
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            max_length=None,
            dataloader_num_workers=2,
        ),
        train_dataset=table,
        data_collator=collate,
        processing_class=build_processor(FAMILY),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("form", [conversations, prompts])
def test_equal_losses(form: Any, tmp_path: Path) -> None:
    assert_equal_losses(
        lambda model, collate: train(model, collate, form(), tmp_path), FAMILY, inner()
    )


def test_padding_free_batches_have_the_same_losses(tmp_path: Path) -> None:
    padded, flat = (
        train(
            prepared("on", FAMILY)[0],
            collator(FAMILY, inner(), packing=packing),
            conversations(),
            tmp_path,
        )
        for packing in (None, "flatten")
    )
    assert len(flat) == STEPS
    torch.testing.assert_close(torch.tensor(flat), torch.tensor(padded), rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", [conversations, prompts])
def test_batches_have_photographs(form: Any) -> None:
    table = form()
    batch = collator(FAMILY, inner())([table[number] for number in range(BATCH)])
    assert len(batch["image_grid_thw"]) > 1
    assert len(batch["pixel_values"]) == batch["image_grid_thw"].prod(-1).sum()
    assert batch["position_ids"].shape == (3, *batch["input_ids"].shape)
    assert not torch.equal(batch["position_ids"][1], batch["position_ids"][2])


def test_cut_placeholders_are_an_error() -> None:
    """TRL cuts the tokens of prompts at `max_length`, and keeps all of the pixels."""
    table = prompts()
    with pytest.raises(SpanMismatchError, match="truncat"):
        collator(FAMILY, inner(max_length=24))([table[number] for number in range(BATCH)])
