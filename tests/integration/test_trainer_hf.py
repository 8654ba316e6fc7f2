"""transformers' Trainer, with `remove_unused_columns` left at its default, True.

What is removed is a column of an example that the model's forward does not name, before the collate
function sees it. What the collate function adds to the batch is never removed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from torch._dynamo.utils import counters

from integration.common import BATCH, STEPS, assert_equal_losses, collator, prepared, rows
from mrope import Shapes
from mrope.collate.collator import Collate
from mrope.hf import attach
from support.models import tiny_examples, tiny_model

Rows = list[dict[str, Any]]


def trainer(model: Any, collate: Collate, dataset: Any, folder: Path, **options: Any) -> Any:
    arguments = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "dataloader_num_workers": 2,
    }
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**{**arguments, **options}),
        train_dataset=dataset,
        data_collator=collate,
    )


def table(examples: Rows) -> datasets.Dataset:
    """Return the rows as `datasets` has them: every column in every row, null where unused."""
    return datasets.Dataset.from_list(
        [{key: torch.as_tensor(x).tolist() for key, x in one.items()} for one in examples]
    )


@pytest.mark.parametrize("form", [list, table])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_equal_losses(family: str, form: Any, tmp_path: Path) -> None:
    def train(model: Any, collate: Collate) -> list[float]:
        run = trainer(model, collate, form(rows(family)), tmp_path)
        run.train()
        return [entry["loss"] for entry in run.state.log_history if "loss" in entry]

    assert_equal_losses(train, family)


def first_batch(family: str, examples: Any, folder: Path, **options: Any) -> dict[str, Any]:
    """Return the first batch that the Trainer's own DataLoader makes of `examples`."""
    model, _ = prepared("on", family)
    packing = options.pop("packing", None)
    run = trainer(model, collator(family, packing=packing), examples, folder, **options)
    batch: dict[str, Any] = next(iter(run.get_train_dataloader()))
    return batch


@pytest.mark.parametrize("form", [list, table])
def test_all_that_the_collator_adds_reaches_the_model(form: Any, tmp_path: Path) -> None:
    examples = rows("qwen3_vl", count=BATCH)
    with_default = first_batch("qwen3_vl", form(examples), tmp_path)
    added = collator("qwen3_vl")(examples)
    assert {"position_ids", "image_cu_seqlens", "has_padding", "rope_deltas"} <= added.keys()
    assert with_default.keys() == added.keys()


@pytest.mark.parametrize("form", [list, table])
@pytest.mark.parametrize("kept", [False, True])
def test_borders_of_packed_rows_need_the_option_off(form: Any, kept: bool, tmp_path: Path) -> None:
    """`seq_lengths` is no argument of forward: by default it is gone, and two examples are one."""
    packed = [{"input_ids": [7, 8, 9, 7, 8], "labels": [7, 8, 9, 7, 8], "seq_lengths": [3, 2]}]
    options: dict[str, Any] = {} if kept is False else {"remove_unused_columns": False}
    batch = first_batch("qwen3_vl", form(packed), tmp_path, packing="flatten", **options)
    assert batch["cu_seq_lens_q"].tolist() == ([0, 3, 5] if kept else [0, 5])


@pytest.mark.parametrize("kept", [False, True])
def test_seconds_are_read_by_their_model_s_own_name(kept: bool, tmp_path: Path) -> None:
    """`second_per_grid_ts` stays; under its other name it is lost, and clips run at 1 second."""
    family = "qwen2_5_vl"
    examples = rows(family, count=BATCH)
    options: dict[str, Any] = {} if kept is False else {"remove_unused_columns": False}
    renamed = [
        {
            ("video_second_per_grid" if key == "second_per_grid_ts" else key): x
            for key, x in one.items()
        }
        for one in examples
    ]
    found = first_batch(family, renamed, tmp_path, **options)
    wanted = first_batch(family, examples, tmp_path)
    assert torch.equal(found["position_ids"], wanted["position_ids"]) == kept


def test_torch_compile_of_the_trainer_makes_one_graph(tmp_path: Path) -> None:
    """Batches with and without images and clips, a ladder of one rung each: one graph, equal losses."""
    family = "qwen3_vl"
    examples = [
        {**example, "labels": torch.as_tensor(example["input_ids"]).clone()}
        for seed in range(6)
        for example in tiny_examples(family, seed=seed, images=seed % 2 == 0, videos=seed % 3 == 0)
    ][:16]
    shapes = Shapes(
        tokens=(128,), patches=(256,), longest=128, patches_per_segment=8, tokens_per_example=8
    )

    def train(**options: Any) -> list[float]:
        model = attach(tiny_model(family).train())
        collate = collator(family, shapes=shapes)
        # An incomplete last batch would have another shape.
        options |= {"remove_unused_columns": False, "dataloader_drop_last": True}
        run = trainer(model, collate, examples, tmp_path, **options)
        run.train()
        return [entry["loss"] for entry in run.state.log_history if "loss" in entry]

    eager = train()
    counters.clear()
    compiled = train(torch_compile=True, torch_compile_backend="eager")
    assert compiled == pytest.approx(eager, abs=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
