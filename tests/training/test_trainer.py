"""`mrope train` under transformers' Trainer: checkpoints, Ctrl-C, resuming, adapters, the stage on and off."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, Trainer, TrainerCallback, set_seed

from mrope import build_collator
from mrope.hf import compile_layers
from mrope.training import trainer as training
from mrope.training.arguments import training_arguments
from mrope.training.compare import compare, compare_runs
from mrope.training.dataloader import load_rows
from mrope.training.model import build_model
from mrope.training.sections import Config
from mrope.training.trainer import StageTrainer, TrainResult, run, train
from training.runs import FLAT, config, losses_of, write_rows

BUDGET = {"max_tokens": 150}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": "gaussian"}
VARIANTS: dict[str, dict[str, Any]] = {
    "padded": {"trainer": {"gradient_accumulation_steps": 2}},
    "budgets": {"rope": FLAT, "dataloader": BUDGET},
    "LoRA on a stream": {
        "rope": FLAT,
        "dataloader": BUDGET | {"buffer_size": 4},
        "peft": LORA,
        "trainer": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    },
}


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class Press(TrainerCallback):  # type: ignore[misc]
    """Press Ctrl-C during a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGINT)


def interrupted(cfg: Config, step: int, monkeypatch: pytest.MonkeyPatch) -> tuple[TrainResult, str]:
    class Pressed(StageTrainer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.add_callback(Press(step))

    console = silent()
    with monkeypatch.context() as patch:
        patch.setattr(training, "StageTrainer", Pressed)
        return train(cfg, console=console), printed(console)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = [*folder.glob("*.safetensors")]
    assert len(files) == 1
    loaded: dict[str, torch.Tensor] = load_file(files[0])
    return loaded


@pytest.mark.parametrize("name", VARIANTS)
def test_an_interrupted_and_resumed_run_is_an_uninterrupted_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, from within an epoch into the next one."""
    cfg = config(tmp_path, **VARIANTS[name])
    stopped, said = interrupted(cfg, 2, monkeypatch)
    assert stopped.stopped and stopped.steps == 2
    assert "stopped at step 2: saved" in said and "--resume" in said
    resumed = train(cfg, resume=True, console=silent())
    assert (resumed.stopped, resumed.steps) == (False, 4)
    whole = config(tmp_path, **VARIANTS[name])
    whole = whole.model_copy(
        update={"trainer": whole.trainer | {"output_dir": str(tmp_path / "whole")}}
    )
    train(whole, console=silent())
    one, other = tmp_path / "out" / "checkpoint-4", tmp_path / "whole" / "checkpoint-4"
    assert losses_of(one) == losses_of(other) and len(set(losses_of(one))) == 4
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_a_checkpoint_is_loaded_by_transformers_alone(tmp_path: Path) -> None:
    """Of flattened batches, evaluated at every step."""
    rows = {"source": str(write_rows(tmp_path)), "eval_source": str(write_rows(tmp_path))}
    trainer = {"max_steps": 2, "save_steps": 1, "eval_strategy": "steps"}
    cfg = config(tmp_path, data=rows, rope=FLAT, dataloader=BUDGET, trainer=trainer)
    console = silent()
    result = train(cfg, console=console)
    assert result.checkpoint is not None and result.checkpoint.endswith("checkpoint-2")
    assert "2 steps in " in printed(console) and "checkpoint-2" in printed(console)
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    evaluated = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert len(evaluated) == 2 and evaluated[0] != evaluated[1]
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        auto: Any = AutoModelForImageTextToText
        model = auto.from_pretrained(folder)
        assert type(model).__name__ == "Qwen3VLForConditionalGeneration"


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_options_of_the_trainer_are_equal_on_and_off_the_stage(family: str, tmp_path: Path) -> None:
    """LoRA, accumulation and gradient checkpointing, of padded batches."""
    trainer = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "max_steps": 3}
    on, off = compare_runs(config(tmp_path, family, trainer=trainer, peft=LORA))
    assert on.losses == off.losses and len(set(on.losses)) == 5
    assert (on.rope_index_calls, off.positions_given, on.positions_given) == (0, 0, 5)
    assert off.rope_index_calls


def test_the_comparison_prints_losses_and_what_each_run_computed(tmp_path: Path) -> None:
    """Of a model that is not attached, whose batches come in batch layout; no times on a CPU."""
    cfg = config(
        tmp_path,
        model={"attach": False},
        rope={"vision": False, "layout": "batch"},
        trainer={"max_steps": 3, "save_steps": 1},
    )
    console = silent()
    assert compare(cfg, console)
    text = printed(console)
    assert "3 of 3 losses are equal to the last bit" in text
    assert re.search(r"batches with position_ids +│ 3 of 3 +│ 0 of 3", text)
    assert re.search(r"calls of get_rope_index in forward +│ 0 +│ [23] ", text)
    assert re.search(r"host syncs in a step +│ \d+ +│ \d+ ", text)
    assert "ms" not in text.replace("items", "") and "seconds" not in text
    assert not (tmp_path / "out").exists()  # nothing is saved


def test_flattened_batches_have_the_losses_of_padded_ones(tmp_path: Path) -> None:
    """With the stage off, the same batches are padded; the budget fills both alike."""
    cfg = config(tmp_path, "qwen2_5_vl", rope=FLAT, dataloader=BUDGET, trainer={"max_steps": 3})
    console = silent()
    assert compare(cfg, console)
    assert "3 of 3 losses are equal within 0.0001" in printed(console)
    assert re.search(r"host syncs in a step +│ 0 +│ \d\d+ ", printed(console))


def test_another_rule_gives_other_losses(tmp_path: Path) -> None:
    """The comparison can fail: text after a clip has other positions under 4.57 than under 5.23."""
    rope = {"reference": "transformers-4.57", "vision": False}
    cfg = config(tmp_path, "qwen2_vl", model={"attach": False}, rope=rope, trainer={"max_steps": 1})
    console = silent()
    assert not compare(cfg, console)
    assert "no, by" in printed(console)


def test_weights_are_those_of_the_trainer_alone(tmp_path: Path) -> None:
    """The subclass adds nothing: AdamW by the same arguments, on the same batches."""
    cfg = config(tmp_path, trainer={"max_steps": 3, "weight_decay": 0.5, "save_strategy": "no"})
    arguments = training_arguments(cfg)
    set_seed(0)
    plain = Trainer(
        build_model(cfg),
        arguments,
        train_dataset=load_rows(cfg),
        data_collator=build_collator(cfg),
    )
    plain.train()
    _, ours = run(cfg, training_arguments(cfg), (load_rows(cfg), None))
    left, right = plain.model.state_dict(), ours.model.state_dict()
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize(("compiled", "half"), [(True, False), ("whole", True)])
@pytest.mark.filterwarnings("ignore:bfloat16 on a CPU")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_model_is_saved_under_the_names_of_its_weights(
    compiled: Any, half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole graphs: `fullgraph` raises otherwise. Their backend is the quickest to compile."""
    own = torch.nn.Module.compile
    calls: list[dict[str, Any]] = []

    def compile_quickly(self: torch.nn.Module, **options: Any) -> None:
        calls.append(options)
        own(self, **options | {"backend": "eager"})

    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    monkeypatch.setattr("mrope.hf.compile_layers", partial(compile_layers, backend="eager"))
    ladder = {"tokens": [256], "patches": [512], "longest": 256, "patches_per_segment": 8}
    cfg = config(
        tmp_path,
        model={"compile": compiled},
        rope={"shapes": ladder},
        trainer={"max_steps": 1, "bf16": half},
    )
    assert train(cfg, console=silent()).report is None
    assert all(call["fullgraph"] and not call["dynamic"] for call in calls)
    assert (len(calls) == 1) == (compiled == "whole")
    assert weights(tmp_path / "out").keys() == build_model(cfg).state_dict().keys()
