"""`equip`: transformers' Trainer with the stage in one call, and what it refuses."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from mrope import MRopeCollator, MRopeError, MRopeSpec, Shapes, VisionSpec
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
    parts = "Qwen3VLVisionModel and Qwen3VLTextModel "
    assert f"Qwen3VLForConditionalGeneration attached; {parts}" in lines[2]
    assert len(lines[2]) < 160
    assert "accelerator_config.non_blocking=True, logging_nan_inf_filter=False" in lines[3]
    assert lines[4] == "  still syncs: nothing known"


def test_options_of_the_stage_are_passed_on(tmp_path: Path) -> None:
    trainer = equip(make(tmp_path), quiet=True, packing="flatten")
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["position_ids"].shape[:2] == (4, 1)
    assert losses(trainer) == pytest.approx(losses(make(tmp_path)), abs=1e-5)
    shapes: dict[str, Any] = {"tokens": [64, 128], "patches": [512]}
    assert equip(make(tmp_path), quiet=True, shapes=shapes).data_collator.shapes == Shapes(**shapes)
    with pytest.raises(TypeError, match="shapes must be of type Shapes, not list"):
        equip(make(tmp_path), quiet=True, shapes=[64])


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
    equip(make(tmp_path, use_cpu=True))
    last = capsys.readouterr().out.splitlines()[-1]
    assert "use_cpu=True turned pinning off" in last
    assert "dataloader_pin_memory" not in last


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
        ({"data_collator": other_merge()}, "give it spec=MRopeSpec.from_config.*alone; it has "),
        (
            {"data_collator": MRopeCollator(None, tiny_spec("qwen3_vl"))},
            "give it vision=VisionSpec.from_config.model.config., or",
        ),
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


class EquipsLate(TrainerCallback):  # type: ignore[misc]
    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, *_: object, **_kwargs: object) -> None:
        equip(self.trainer, quiet=True)


def test_too_late_and_no_trainer(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.model_wrapped = torch.nn.Sequential(trainer.model)
    with pytest.raises(MRopeError, match="has wrapped its model already"):
        equip(trainer)
    trainer = make(tmp_path)
    trainer.add_callback(EquipsLate(trainer))
    with pytest.raises(MRopeError, match="too late: Trainer is training; call equip before train"):
        trainer.train()
    with pytest.raises(MRopeError, match="takes a transformers Trainer"):
        equip(tiny_model("qwen3_vl"))
    with pytest.raises(MRopeError, match="give packing to that"):
        equip(make(tmp_path, data_collator=collator()), packing="flatten")


class Processor:
    """One whose batches are numbered, as some models' own are."""

    def __call__(self, rows: Any) -> Any:
        batch = PaddingCollator()(rows)
        return batch | {"position_ids": torch.zeros_like(batch["input_ids"])}


class OfProcessor:
    """A collate function as trainers write it: whatever the processor returns."""

    def __init__(self) -> None:
        self.processor = Processor()

    def __call__(self, rows: Any) -> Any:
        return self.processor(rows)


class Pairs:
    """Batches under other names, as TRL's KTO trainer makes them."""

    def __call__(self, rows: Any) -> Any:
        batch = PaddingCollator()(rows)
        return {f"prompt_{name}": value for name, value in batch.items()}


def numbered_rows() -> Any:
    rows = tiny_examples("qwen3_vl", rows=9)
    return [{**row, "position_ids": row["input_ids"]} for row in rows]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_collator": OfProcessor()}, "batches of OfProcessor have position_ids already"),
        ({"rows": numbered_rows()}, "batches of PaddingCollator have position_ids already"),
        ({"data_collator": Pairs()}, "batches of Pairs have no input_ids.* but prompt_"),
    ],
)
def test_batches_that_the_stage_does_not_take_are_refused_at_once(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trainer = make(tmp_path, **options)
    with pytest.raises(MRopeError, match=message):
        equip(trainer, quiet=True)
    assert not is_attached(trainer.model)


class NumberedRows(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(numbered_rows())


def test_those_of_a_stream_are_refused_at_the_first_batch(tmp_path: Path) -> None:
    with pytest.raises(MRopeError, match="two sources of one tensor"):
        losses(equip(make(tmp_path, rows=NumberedRows()), quiet=True))


class OnlyWhole:
    """Fails on a single row, and draws random numbers before."""

    def __call__(self, rows: Any) -> Any:
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
        assert len(rows) == 3
        return PaddingCollator()(rows)


def drawn() -> list[Any]:
    """The state of each source of random numbers."""
    of_numpy: Any = np.random.get_state()  # noqa: NPY002
    return [torch.random.get_rng_state().tolist(), random.getstate(), of_numpy[1].tolist()]


def test_one_row_is_looked_at_without_a_trace(tmp_path: Path) -> None:
    trainer = make(tmp_path, data_collator=OnlyWhole())
    before = drawn()
    equip(trainer, quiet=True)
    assert drawn() == before
    assert losses(trainer) == pytest.approx(losses(make(tmp_path)), abs=1e-5)


def test_a_head_that_numbers_in_1_d_is_refused(tmp_path: Path) -> None:
    from hf.test_heads import retrieval_model

    with pytest.raises(MRopeError, match="ColQwen2ForRetrieval numbers tokens in 1-D"):
        equip(make(tmp_path, retrieval_model("qwen2_vl"), family="qwen2_vl"))


class LikeAxolotl(Trainer):  # type: ignore[misc]
    """Loaders, sampler, loss and the collator of evaluation are its own; as in axolotl 0.19."""

    data_collator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eval_data_collator = PaddingCollator()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        given, self.data_collator = self.data_collator, self.eval_data_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = given

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, *args, **kwargs)


class LikeSwift(Trainer):  # type: ignore[misc]
    """Makes its loader itself, and its loss from the logits; as in ms-swift 4.6."""

    def get_train_dataloader(self) -> Any:
        loader = DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits = outputs.logits[:, :-1].flatten(0, 1).float()
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_5"])
@pytest.mark.parametrize("kind", [LikeAxolotl, LikeSwift])
def test_subclasses_as_frameworks_write_them(kind: type, family: str, tmp_path: Path) -> None:
    rows = tiny_examples(family, rows=4)
    plain, equipped = (make(tmp_path, kind=kind, family=family) for _ in range(2))
    equip(equipped, quiet=True)
    assert losses(equipped) == pytest.approx(losses(plain), abs=1e-5)
    ours, theirs = (one.evaluate(rows)["eval_loss"] for one in (equipped, plain))
    assert ours == pytest.approx(theirs, abs=1e-5)
