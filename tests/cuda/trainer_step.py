"""Measure a training step of axolotl, or of TRL's SFTTrainer, before and after `equip`, on a GPU.

    PYTHONPATH=src:tests python -m cuda.trainer_step axolotl|trl [FILE.json]

A Qwen3-VL with random weights on photographs, bfloat16, four rows a step. Each variant trains in a
process of its own by the trainer's own entry point: syncs of ten steps after five of warm-up, by
CUDA's sync debug mode, then milliseconds a step of twenty others that nothing watches, by the host's
clock between two synchronized ends. Without a GPU the model is smaller, the guard counts, and the
times say nothing of a GPU. axolotl 0.19.0 needs transformers 5.16.1 and TRL 1.9.0.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from mrope.hf import SyncReport, equip

CUDA = torch.cuda.is_available()
WARMUP, WATCHED, BETWEEN, TIMED = 5, 10, 5, 20
STEPS = WARMUP + WATCHED + BETWEEN + TIMED
BATCH = 4
# About 1.1 billion weights: Qwen3-VL-2B's widths, with 16 layers in the text and in the tower.
TEXT: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    },
}
VISION = {
    "depth": 16,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "out_hidden_size": 2048,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [3, 7, 11],
}
# What differs between the variants: keys of axolotl's YAML, and whether the plug-in is among them.
OWN = "cuda.trainer_step.Watch"
PLUGIN = "mrope.transforms.axolotl.MRopePlugin"
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "axolotl": {
        "axolotl": {"plugins": [OWN]},
        "axolotl, equipped": {"plugins": [PLUGIN, OWN]},
        "axolotl, include_tkps: false": {"plugins": [OWN], "include_tkps": False},
        "axolotl, equipped, include_tkps: false": {"plugins": [PLUGIN, OWN], "include_tkps": False},
    },
    "trl": {"SFTTrainer": {"equip": False}, "SFTTrainer, equipped": {"equip": True}},
}


class Clock(TrainerCallback):  # type: ignore[misc]
    """Take the time of the last steps, and print what they and the report before them found."""

    def __init__(self, report: SyncReport) -> None:
        self.report, self.marks = report, list[float]()

    def on_step_end(self, _args: Any, state: Any, *_: Any, **_kwargs: Any) -> None:
        if state.global_step in (STEPS - TIMED, STEPS):
            if CUDA:
                torch.cuda.synchronize()
            self.marks.append(time.perf_counter())

    def on_train_end(self, _args: Any, state: Any, *_: Any, **_kwargs: Any) -> None:
        first, last = self.marks
        result = self.report.as_dict() | {
            "milliseconds": 1000 * (last - first) / TIMED,
            "loss": next(one["train_loss"] for one in state.log_history if "train_loss" in one),
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if CUDA else None,
        }
        print("RESULT " + json.dumps(result))


def callbacks() -> list[TrainerCallback]:
    report = SyncReport(WATCHED, WARMUP, quiet=True)
    return [report, Clock(report)]


def with_axolotl(folder: Path, options: dict[str, Any]) -> None:
    from axolotl.cli.train import do_cli

    config = {
        "base_model": str(folder / "model"),
        "processor_type": "AutoProcessor",
        "chat_template": "qwen2_vl",
        "datasets": [
            {"path": str(folder / "rows/parts.jsonl"), "ds_type": "json", "type": "chat_template"}
        ],
        "skip_prepare_dataset": True,
        "remove_unused_columns": False,
        "sample_packing": False,
        "val_set_size": 0.0,
        "sequence_len": 8192,
        "pad_to_sequence_len": False,
        "micro_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "learning_rate": 1e-4,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "bf16": CUDA,
        "tf32": False,
        "attn_implementation": "sdpa",
        "dataloader_num_workers": 8 if CUDA else 1,
        "logging_steps": 500,
        "save_strategy": "no",
        "seed": 0,
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
        **options,
    }
    file = folder / "axolotl.yaml"
    file.write_text(json.dumps(config), "utf-8")  # which is YAML too
    sys.argv = sys.argv[:1]
    do_cli(str(file))


def with_trl(folder: Path, options: dict[str, Any]) -> None:
    import trl
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from mrope.training.demo.dataset import photographs

    rows = photographs(300).filter(lambda row: not row["videos"])
    dtype = torch.bfloat16 if CUDA else torch.float32
    trainer = trl.SFTTrainer(
        model=AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=dtype),
        args=trl.SFTConfig(
            output_dir=str(folder / "out"),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-4,
            logging_steps=500,
            save_strategy="no",
            report_to=[],
            bf16=CUDA,
            max_length=None,
            dataloader_num_workers=8 if CUDA else 0,
            gradient_checkpointing=False,
        ),
        train_dataset=rows.remove_columns(["videos", "fps"]),
        processing_class=AutoProcessor.from_pretrained(folder / "model"),
        callbacks=callbacks(),
    )
    if options["equip"]:
        equip(trainer)
    trainer.train()


def measured(kind: str, name: str, folder: Path) -> dict[str, Any]:
    """Run a variant in a process of its own, and return what its clock printed."""
    command = [sys.executable, "-m", "cuda.trainer_step", kind, name, str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if run.returncode or not found:
        sys.exit(f"{name}: {run.stdout[-3000:]}\n{run.stderr[-6000:]}")
    result: dict[str, Any] = json.loads(found[0].removeprefix("RESULT "))
    print(
        f"{name}: {result['per_step']:g} syncs and {result['milliseconds']:.1f} ms a step, "
        f"mean loss {result['loss']:.6f}, by {result['judge']}",
        *(place_line(place, result["steps"]) for place in result["places"][:8]),
        sep="\n    ",
        flush=True,
    )
    return result


def place_line(place: dict[str, Any], steps: int) -> str:
    file = "/".join(place["file"].split("/")[-2:])
    return f"{place['count'] / steps:g} {file}:{place['line']} {place['function']}: {place['op']}"


def versions() -> list[str]:
    names = ("torch", "transformers", "accelerate", "trl", "axolotl")
    installed = list(importlib.metadata.distributions())
    # The first on the path is the one that is imported.
    found = {one.metadata["Name"]: one.version for one in reversed(installed)}
    return [f"{name} {found.get(name, 'is not installed')}" for name in names]


def main(kind: str, file: str | None = None) -> None:
    from support.saved import save_model, save_rows

    print(torch.cuda.get_device_name() if CUDA else "CPU", *versions(), sep="; ", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        text, vision = (TEXT, VISION) if CUDA else ({}, {})
        save_model(Path(folder) / "model", text, vision, longest=1024)
        save_rows(Path(folder) / "rows", count=300, scale=4 if CUDA else 1)
        results = {name: measured(kind, name, Path(folder)) for name in VARIANTS[kind]}
    if file is not None:
        Path(file).write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        main(*sys.argv[1:])
    else:
        os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
        _, which, variant, where = sys.argv
        train = with_axolotl if which == "axolotl" else with_trl
        train(Path(where), VARIANTS[which][variant])
elif "axolotl" in sys.modules:
    from axolotl.integrations.base import BasePlugin

    class Watch(BasePlugin):  # type: ignore[misc]
        """Add the report and the clock to axolotl's trainer."""

        def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
            return callbacks()
