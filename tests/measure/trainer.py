"""Count the syncs of transformers' Trainer and of the package's own loop, before and after the recipe.

    PYTHONPATH=src:tests python -m measure.trainer [FILE.json]

Ten steps after three of warm-up, of a Qwen3-VL of four layers with random weights, on rows of four
images of many sizes and one clip: the plain model and the attached one with the Trainer's defaults,
the attached one with `TRAINER_RECIPE`, and the package's own loop. On a GPU torch's sync debug mode
reports, without one the guard. Each row also has milliseconds per step, host clock between two
synchronized ends, from a second run that nothing watches.

Beside torch it needs transformers 5.24 with accelerate 1.15, pydantic, omegaconf, PyYAML and rich.
On a CPU the model is smaller, and its times say nothing of a GPU.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from rich.console import Console

from mrope.check.syncs import TRAINER_RECIPE, run_trainer
from mrope.hf import SyncReport
from mrope.training.sections import Config
from mrope.training.step import choose_device, finish

CUDA = torch.cuda.is_available()
STEPS, WARMUP = 10, 3
HIDDEN, HEADS, LAYERS = (1024, 8, 4) if CUDA else (64, 2, 2)
MODEL: dict[str, Any] = {
    "model_type": "qwen3_vl",
    "image_token_id": 501,
    "video_token_id": 502,
    "vision_start_token_id": 503,
    "vision_end_token_id": 504,
    "text_config": {
        "hidden_size": HIDDEN,
        "intermediate_size": 3 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
        "vocab_size": 512,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [HIDDEN // HEADS // 4, HIDDEN // HEADS // 8, HIDDEN // HEADS // 8],
        },
    },
    "vision_config": {
        "hidden_size": HIDDEN,
        "out_hidden_size": HIDDEN,
        "intermediate_size": 3 * HIDDEN,
        "num_heads": HEADS,
        "depth": LAYERS,
        "num_position_embeddings": 2304 if CUDA else 64,
        "deepstack_visual_indexes": [0],
    },
}


class Clock(SyncReport):
    """The steps of a report, timed instead of watched."""

    def step(self) -> None:
        """Count a step, and take the time at both ends of the measured ones."""
        self._done += 1
        if self._done in (WARMUP, WARMUP + STEPS):
            finish(choose_device("auto"))
            self.marks.append(time.perf_counter())

    def _arm(self) -> None:
        self.marks: list[float] = []
        self._done, self._pending = 0, False

    @property
    def milliseconds(self) -> float:
        """Time of one step."""
        first, last = self.marks
        return 1000 * (last - first) / STEPS


def config(*, attached: bool) -> Config:
    sides = [16, 40] if CUDA else [4, 8]
    shape = {"width": 2048 if CUDA else 128, "images": 4, "image_sides": sides}
    shape |= {"videos": 1, "frames": 4, "frame": [sides[0]] * 2}
    return Config.model_validate(
        {
            "model": {
                "config": MODEL,
                "attach": attached,
                "dtype": "bfloat16" if CUDA else "float32",
            },
            "data": {"source": "synthetic", "rows": 64, "shape": shape},
            "rope": {"enabled": attached, "vision": attached},
            "dataloader": {
                "batch_size": 2,
                "num_workers": 4 if CUDA else 0,
                "pin_memory": True,
            },
            "trainer": {"max_steps": STEPS, "seed": 0, "learning_rate": 1e-3},
        }
    )


def measure(name: str, run: Any, console: Console) -> dict[str, Any]:
    report, clock = SyncReport(STEPS, WARMUP, quiet=True), Clock(STEPS, WARMUP, quiet=True)
    loss = run(report)
    run(clock)
    console.print(f"\n{name}: {clock.milliseconds:.1f} ms a step, mean loss {loss:.6f}")
    console.print(report.table())
    result = report.as_dict() | {"milliseconds": clock.milliseconds, "loss": loss}
    for place in result["places"]:
        place["file"] = inside_package(place["file"])
    return result


def inside_package(file: str) -> str:
    """Return a path without the folders of this machine."""
    for root in ("site-packages/", "dist-packages/", "/src/"):
        file = file.rpartition(root)[2]
    return file


def main() -> None:
    console, began = Console(width=150), time.perf_counter()
    plain, attached = config(attached=False), config(attached=True)
    # Kernels are loaded at the first call of each shape: not in the first row's time.
    run_trainer(plain, {}, Clock(STEPS, WARMUP, quiet=True))
    runs = {
        "Trainer, plain model, defaults": lambda one: run_trainer(plain, {}, one),
        "Trainer, attached, defaults": lambda one: run_trainer(attached, {}, one),
        "Trainer, attached, recipe": lambda one: run_trainer(attached, TRAINER_RECIPE, one),
    }
    results = {name: measure(name, run, console) for name, run in runs.items()}
    versions = {one.__name__: one.__version__ for one in (torch, transformers, accelerate)}
    device = torch.cuda.get_device_name() if CUDA else "cpu"
    for name, result in results.items():
        syncs, each = f"{result['syncs']:5d} syncs", f"{result['milliseconds']:7.1f} ms a step"
        console.print(f"{name:32s} {syncs} in {result['steps']} steps {each}")
    console.print(device, versions, f"{time.perf_counter() - began:.0f} s in all")
    if len(sys.argv) > 1:
        data = {"device": device, "versions": versions, "recipe": TRAINER_RECIPE, "runs": results}
        Path(sys.argv[1]).write_text(json.dumps(data, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
