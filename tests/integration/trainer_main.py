"""Train by a framework's own entry point, and write down each step's loss and what synced.

    python -m integration.trainer_main axolotl|ms-swift|LLaMA-Factory CONFIG.json RESULT.json

A process of its own for each training: these frameworks replace functions of transformers. The
config is what the framework's own command line takes, as JSON, which is YAML too.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from integration.on_cpu import decode_by_pillow, replace_torchaudio
from mrope.hf import SyncReport

STEPS, WARMUP, WATCHED = 6, 2, 3
# Keys that all three configs have.
SCHEDULE = {
    "max_steps": STEPS,
    "eval_steps": STEPS,
    "save_strategy": "no",
    "logging_steps": 500,
    "learning_rate": 1e-3,
    "output_dir": "out",
    "seed": 0,
}
# And those of configs that name transformers' own arguments.
ARGUMENTS = SCHEDULE | {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "eval_strategy": "steps",
    "lr_scheduler_type": "constant",
    "dataloader_num_workers": 1,
    "report_to": "none",
}
ROOT = Path(__file__).parents[2]


def watch(file: Path) -> None:
    """Let every trainer write `file` when it has trained."""
    own_train, own_step = transformers.Trainer.train, transformers.Trainer.training_step
    losses: list[torch.Tensor] = []

    def step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        losses.append(own_step(self, *args, **kwargs))
        return losses[-1]

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        report = SyncReport(WATCHED, WARMUP, quiet=True)
        self.add_callback(report)
        output = own_train(self, *args, **kwargs)
        evals = [one["eval_loss"] for one in self.state.log_history if "eval_loss" in one]
        result = {"losses": torch.stack(losses).tolist(), "eval": evals, "syncs": report.as_dict()}
        file.write_text(json.dumps(result), "utf-8")
        return output

    transformers.Trainer.train, transformers.Trainer.training_step = train, step


def with_axolotl(config: Path) -> None:
    from axolotl.cli.train import do_cli

    do_cli(str(config))


def with_ms_swift(config: Path) -> None:
    from swift.pipelines import sft_main
    from swift.template.templates.qwen import Qwen2VLTemplate
    from transformers import AutoTokenizer

    options = json.loads(config.read_text("utf-8"))
    # The numbers that it takes placeholders to have are those of Qwen's vocabulary.
    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    Qwen2VLTemplate.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    Qwen2VLTemplate.video_token_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    sft_main([part for name, value in options.items() for part in (f"--{name}", str(value))])


def with_llama_factory(config: Path) -> None:
    replace_torchaudio()
    options = json.loads(config.read_text("utf-8"))
    importlib.import_module(options.pop("module")).run_exp(options)


MAIN = {"axolotl": with_axolotl, "ms-swift": with_ms_swift, "LLaMA-Factory": with_llama_factory}


def run(kind: str, config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train in a process of its own, and return what it wrote down."""
    files = folder / "config.json", folder / "result.json"
    files[0].write_text(json.dumps(config), "utf-8")
    files[1].unlink(missing_ok=True)
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", __name__, kind, *map(str, files)],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
        | {
            "AXOLOTL_DO_NOT_TRACK": "1",
            "USE_HF": "1",
            "DISABLE_VERSION_CHECK": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout[-3000:] + child.stderr[-6000:]
    result: dict[str, Any] = json.loads(files[1].read_text("utf-8"))
    assert len(result["losses"]) == STEPS == len(set(result["losses"]))
    return result


def compare(
    kind: str, plain: dict[str, Any], equipped: dict[str, Any], folder: Path, rel: float = 0.0
) -> list[dict[str, Any]]:
    """Train by both configs, compare each step's and each evaluation's loss, and return the syncs.

    Args:
        rel: relative difference of losses; 0: they are equal to the last bit.
    """
    one, other = (run(kind, config, folder) for config in (plain, equipped))
    assert one["eval"]
    for name in ("losses", "eval"):
        assert other[name] == pytest.approx(one[name], rel=rel, abs=0)
    return [one["syncs"], other["syncs"]]


if __name__ == "__main__":
    name, config_file, result_file = sys.argv[1:]
    sys.argv = sys.argv[:1]
    decode_by_pillow()
    watch(Path(result_file))
    MAIN[name](Path(config_file))
