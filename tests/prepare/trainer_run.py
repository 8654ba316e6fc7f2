"""Train with a `TokenBudgetSampler` from `_get_train_sampler`, stop in the middle of an epoch, go on.

    torchrun --nproc_per_node=2 -m prepare.trainer_run FOLDER

Every rank writes to FOLDER/RANK.json which examples it took at each step, of a run without a stop and
of one that was resumed, and the weight that each ended with.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from mrope import TokenBudgetSampler

BUDGET = 60
LENGTHS = [(7 * number) % 41 + 5 for number in range(61)]
EPOCHS = 3


class Counter(torch.nn.Module):
    """A model of one weight, which keeps the examples of each batch; the loss depends on order."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.batches: list[list[int]] = []

    def forward(self, index: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.batches.append(index.tolist())
        return {"loss": ((self.weight - labels) ** 2).mean()}


class Budgeted(Trainer):  # type: ignore[misc]
    """A user's subclass: nothing but the sampler is its own."""

    def _get_train_sampler(self, *_: object) -> TokenBudgetSampler:
        return TokenBudgetSampler(LENGTHS, BUDGET, seed=3)


def collate(rows: list[dict[str, int]]) -> dict[str, torch.Tensor]:
    index = torch.tensor([row["index"] for row in rows])
    return {"index": index, "labels": index / len(LENGTHS)}


def make_trainer(folder: Path, kind: type[Trainer] = Budgeted, **options: Any) -> Any:
    settings = {
        "num_train_epochs": EPOCHS,
        "learning_rate": 0.1,
        "save_steps": 1,
        "save_only_model": False,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    rows = [{"index": number} for number in range(len(LENGTHS))]
    arguments = TrainingArguments(str(folder), **{**settings, **options})
    return kind(Counter(), arguments, train_dataset=rows, data_collator=collate)


def run(folder: Path, stop: int, **options: Any) -> dict[str, Any]:
    """Return the batches and the weight of a whole run, and of one resumed after `stop` steps."""
    whole = make_trainer(folder / "whole", **options)
    whole.train()
    rest = make_trainer(folder / "whole", **options)
    rest.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{stop}"))
    return {
        "batches": whole.model.batches,
        "weight": whole.model.weight.item(),
        "rest": rest.model.batches,
        "rest_weight": rest.model.weight.item(),
        "length": len(whole.get_train_dataloader()),
        "steps": whole.state.global_step,
    }


def main(folder: Path) -> None:
    result = run(folder, stop=25, dataloader_num_workers=1)
    rank = torch.distributed.get_rank()
    (folder / f"{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
