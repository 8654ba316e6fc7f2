"""PyTorch Lightning: a module around the model, and the collator in its DataLoader."""

from __future__ import annotations

from typing import Any

import lightning
import pytest
import torch

from integration.common import STEPS, assert_equal_losses, loader, optimizer, rows
from mrope.collate.collator import Collate

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
pytestmark = [
    # Lightning's own call of what torch deprecated.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning"),
    # Two workers are right for these rows, whatever the machine has.
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


class Module(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Any]) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer(self.model)


def train(model: Any, collate: Collate, family: str) -> list[float]:
    module = Module(model)
    trainer = lightning.Trainer(max_steps=STEPS, accelerator="cpu", **QUIET)
    trainer.fit(module, loader(rows(family), collate))
    return module.losses


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_equal_losses(family: str) -> None:
    assert_equal_losses(lambda model, collate: train(model, collate, family), family)
