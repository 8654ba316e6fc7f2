"""Sections `trainer` and `peft`: what is accepted and refused, the defaults, and the warnings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mrope import MRopeError
from mrope.training.arguments import lora_config, training_arguments
from mrope.training.sections import Config, ConfigError
from mrope.training.trainer import train
from training.runs import config


def arguments(folder: Path, **trainer: Any) -> Any:
    return training_arguments(config(folder, trainer=trainer))


def test_the_recipe_without_a_sync_is_the_default(tmp_path: Path) -> None:
    found = arguments(tmp_path)
    assert found.accelerator_config.non_blocking and found.dataloader_pin_memory
    assert not found.logging_nan_inf_filter and not found.remove_unused_columns
    assert found.report_to == [] and found.prediction_loss_only
    kept = arguments(tmp_path, accelerator_config={"even_batches": False}, report_to="tensorboard")
    assert kept.accelerator_config.non_blocking and not kept.accelerator_config.even_batches
    assert kept.report_to == ["tensorboard"]


def test_fields_have_their_own_names_and_paths_are_those_of_the_file(tmp_path: Path) -> None:
    found = arguments(tmp_path, num_train_epochs=2.5, lr_scheduler_type="cosine", save_steps=7)
    assert (found.num_train_epochs, found.save_steps, found.max_steps) == (2.5, 7, 4)
    assert found.lr_scheduler_type == "cosine"
    assert found.output_dir == str(tmp_path / "out")


def test_the_section_dataloader_is_the_trainers(tmp_path: Path) -> None:
    section = {"batch_size": 3, "num_workers": 2, "prefetch_factor": 4, "start_method": "fork"}
    found = training_arguments(config(tmp_path, dataloader=section))
    assert (found.per_device_train_batch_size, found.per_device_eval_batch_size) == (3, 3)
    assert (found.dataloader_num_workers, found.dataloader_prefetch_factor) == (2, 4)
    assert found.dataloader_multiprocessing_context == "fork"
    assert arguments(tmp_path, per_device_eval_batch_size=8).per_device_eval_batch_size == 8
    with pytest.raises(ConfigError, match=r"_train_batch_size: 8, but dataloader.batch_size is 2"):
        arguments(tmp_path, per_device_train_batch_size=8)


def test_all_wrong_fields_are_listed_at_once(tmp_path: Path) -> None:
    wrong = {"learning_rte": 1e-4, "save_steps": "often", "bf16": 3, "nothing_like_it": 1}
    with pytest.raises(ConfigError) as caught:
        arguments(tmp_path, **wrong)
    assert str(caught.value).splitlines() == [
        "trainer: 4 problems",
        "  trainer.learning_rte: unknown key (did you mean 'learning_rate'?)",
        "  trainer.save_steps: must be a valid number, unable to parse string as a number, "
        "not 'often' (str)",
        "  trainer.bf16: must be a valid boolean, unable to interpret input, not 3 (int)",
        "  trainer.nothing_like_it: unknown key; known: the fields of TrainingArguments",
    ]
    with pytest.raises(ConfigError, match="trainer: .*not a valid SaveStrategy"):
        arguments(tmp_path, save_strategy="sometimes")


def test_lora_has_its_own_fields(tmp_path: Path) -> None:
    cfg = config(tmp_path, peft={"r": 4, "target_modules": ["q_proj"]})
    assert (lora_config(cfg).r, lora_config(cfg).target_modules) == (4, {"q_proj"})
    wrong: dict[str, Any] = {"rank": 4, "lora_alph": 3}
    with pytest.raises(
        ConfigError, match=r"peft.lora_alph: unknown key .did you mean 'lora_alpha'"
    ):
        training_arguments(config(tmp_path, peft=wrong))
    with pytest.raises(ConfigError, match="peft: Target modules .*nowhere.* not found"):
        train(config(tmp_path, peft={"target_modules": ["nowhere"]}))


@pytest.mark.parametrize("section", [{"model": {"dtype": "bfloat16"}}, {"trainer": {"bf16": True}}])
def test_bfloat16_on_a_cpu_is_warned_of(section: dict[str, Any], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="bfloat16 on a CPU is several times slower than float32"):
        training_arguments(config(tmp_path, **section))


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    with pytest.raises(MRopeError, match="there is no checkpoint in .*out to resume from"):
        train(config(tmp_path), resume=True)
    gone: Config = config(tmp_path, trainer={"resume_from_checkpoint": "gone"})
    with pytest.raises(MRopeError, match="trainer.resume_from_checkpoint: no folder at .*gone"):
        train(gone)
    # A checkpoint that was not written to its end is passed over.
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(MRopeError, match="there is no checkpoint"):
        train(config(tmp_path, trainer={"resume_from_checkpoint": "true"}))


def test_what_the_trainer_would_find_out_late_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trainer.eval_strategy needs data.eval_source"):
        arguments(tmp_path, eval_strategy="epoch")
    rope = {"packing": "flatten"}
    loader = {"max_tokens": 100, "buffer_size": 4}
    endless = config(tmp_path, rope=rope, dataloader=loader, trainer={"max_steps": -1})
    with pytest.raises(ConfigError, match="buffer_size needs trainer.max_steps: a stream has no"):
        training_arguments(endless)
