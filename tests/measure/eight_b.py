"""Train a Qwen3-VL of 8B shape by transformers' Trainer, as it is and equipped, with JPEGs: samples a second.

    PYTHONPATH=src:tests python -m measure.eight_b OUT.jsonl [--runs full-plain,lora-layers] [--epochs-before 1]

The whole step that a user has: JPEGs decoded, resized and made patches by Qwen3-VL's processor in workers, copies,
forward and backward under gradient checkpointing, clipping of gradients, fused AdamW. Weights are random. `full`
trains all of them, with weights, gradients and both moments in bfloat16; `lora` trains PEFT's adapters of
rank 16 on all projections of the text.

| run | model and batches |
|---|---|
| `plain` | Trainer as it is, sdpa, padded rows |
| `flash` | the same under transformers' flash path, by torch's copy of the kernels: see `measure.peers.kernels` |
| `equipped` | after `mrope.hf.equip(trainer)`: padded rows |
| `flattened` | after `equip(trainer, packing="flatten")`: no padding |
| `layers` | flattened, with one rung of tokens and of patches, and `compile_layers` |

All take the same examples in the same order. Ten steps after three; then two whose syncs are counted. With
`--epochs-before 1` the same steps of the second epoch: under sdpa on Hopper torch builds a plan for each
number of patches when it first meets it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from measure.peers import cell
from measure.peers.cell import DEVICE, DTYPE, ON_GPU
from measure.peers.flops import step_tflop, utilisation
from measure.peers.kernels import provide_flash_attn

if __name__ == "__main__":
    provide_flash_attn()  # before transformers, which looks for it when imported

from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

MODEL = Path(__file__).parents[2] / "configs/bench/models/8b.json"
RUNS = "full-plain,full-equipped,full-layers,lora-plain,lora-equipped,lora-layers,full-flash,lora-flash,full-flattened"
WARM_UP, STEPS, WATCHED, BATCH = (3, 10, 2, 4) if ON_GPU else (1, 1, 1, 2)
ROWS = (WARM_UP + STEPS + WATCHED) * BATCH
IMAGES = 1, 6  # of a row, at least and at most
SIDES = (320, 960) if ON_GPU else (40, 96)  # of an image, in pixels
WORKERS = 8 if ON_GPU else 1
TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


class Clock(TrainerCallback):  # type: ignore[misc]
    """Takes the time at both ends of the measured steps."""

    def __init__(self, warm_up: int) -> None:
        self.marks: list[float] = []
        self.ends = warm_up, warm_up + STEPS, warm_up + STEPS + WATCHED

    def on_step_end(self, _arguments: object, state: Any, *_: object, **__: object) -> None:
        if state.global_step in self.ends:
            cell.synchronize()
            self.marks.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Of a measured step."""
        return (self.marks[1] - self.marks[0]) / STEPS

    @property
    def last_seconds(self) -> float:
        """Of a step whose syncs are counted."""
        return (self.marks[2] - self.marks[1]) / WATCHED


class Collate:
    """Decodes the JPEGs of some rows and gives them to the processor: a padded batch with labels."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        texts = [
            self.processor.apply_chat_template(row["messages"], tokenize=False) for row in rows
        ]
        images = [Image.open(file).convert("RGB") for row in rows for file in row["images"]]
        batch = dict(self.processor(text=texts, images=images, padding=True, return_tensors="pt"))
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch


def make_rows(folder: Path) -> list[dict[str, Any]]:
    """Write JPEGs, parts of scikit-learn's two photographs, and return conversations about them."""
    from sklearn.datasets import load_sample_images

    from mrope.training.demo.tokenizer import corpus

    photos = [Image.fromarray(one) for one in load_sample_images().images]
    rng, rows = random.Random(0), []
    for row in range(ROWS):
        files = []
        for number in range(rng.randint(*IMAGES)):
            photo, share = rng.choice(photos), rng.uniform(0.4, 1)
            width, height = int(photo.width * share), int(photo.height * rng.uniform(0.4, 1))
            side = rng.randint(*SIDES) / max(width, height)
            part = photo.crop((0, 0, width, height))
            files.append(folder / f"{row}-{number}.jpg")
            part.resize((round(width * side), round(height * side))).save(files[-1])
        asked = [{"type": "image"}] * len(files) + [{"type": "text", "text": "What is shown?"}]
        answer = " ".join(rng.choices(corpus(), k=2))
        talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        rows.append({"messages": talk, "images": files})
    return rows


class Bench:
    """The rows of all runs, their sizes, and the model that each run builds anew."""

    def __init__(self, folder: Path, model: Path, epochs_before: int = 0) -> None:
        from integration.common import build_processor

        self.warm_up = WARM_UP + epochs_before * ROWS // BATCH
        self.folder, self.rows = folder, make_rows(folder)
        processor = build_processor("demo")
        processor.image_processor.size = {"shortest_edge": 32**2, "longest_edge": 1024**2}
        self.collate = Collate(processor)
        ids = {
            f"{name}_id": getattr(processor, f"{name}_id")
            for name in ("image_token", "video_token")
        }
        more = ("vision_start_token_id", "vision_end_token_id")
        ids |= {name: getattr(processor, name) for name in more}
        self.config = json.loads(model.read_text(encoding="utf-8")) | ids
        made = (self.collate([row]) for row in self.rows)
        self.sizes = [
            {"input_ids": row["input_ids"][0], "image_grid_thw": row["image_grid_thw"].tolist()}
            for row in made
        ]

    def build(self, attention: str) -> Any:
        config = dict(self.config)
        live = AutoConfig.for_model(config.pop("model_type"), **config)
        with DEVICE:
            model = AutoModelForImageTextToText.from_config(
                live, attn_implementation=attention, dtype=DTYPE
            )
        cell.draw_weights(model.named_parameters())
        return model

    def trainer(self, model: Any, callbacks: list[Any]) -> Trainer:
        arguments = TrainingArguments(
            str(self.folder / "out"),
            max_steps=self.warm_up + STEPS + WATCHED,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-5,
            optim="adamw_torch_fused",
            gradient_checkpointing=True,
            train_sampling_strategy="sequential",
            dataloader_num_workers=WORKERS,
            dataloader_drop_last=True,
            remove_unused_columns=False,
            logging_steps=500,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=0,
        )
        return Trainer(
            model,
            arguments,
            train_dataset=self.rows,
            data_collator=self.collate,
            callbacks=callbacks,
        )

    def ladder(self) -> Any:
        """Return one rung for the largest flattened batch; the rows are drawn in their order."""
        from mrope import Shapes

        patches = [[int(np.prod(grid)) for grid in row["image_grid_thw"]] for row in self.sizes]
        batches = [range(at, at + BATCH) for at in range(0, ROWS, BATCH)]
        return Shapes.fit(
            [sum(len(self.sizes[row]["input_ids"]) for row in rows) for rows in batches],
            [sum(sum(patches[row]) for row in rows) for rows in batches],
            [sum(len(patches[row]) for row in rows) for rows in batches],
            max(max(one) for one in patches),
            examples=[BATCH] * len(batches),
            graphs=1,
        )

    def tflop(self) -> float:
        """Return the operations of a step, forward and backward of all weights, without recomputation."""
        return step_tflop(self.config, self.sizes) * BATCH / ROWS


def add_adapters(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))


def equip_trainer(bench: Bench, trainer: Trainer, how: str) -> dict[str, Any]:
    from mrope.hf import compile_layers, equip

    if how == "equipped":
        equip(trainer)
    elif how == "flattened":
        equip(trainer, packing="flatten")
    elif how == "layers":
        ladder = bench.ladder()
        equip(trainer, packing="flatten", shapes=ladder.shapes)
        compile_layers(trainer.model)
        padding = {"tokens": ladder.token_padding, "patches": ladder.patch_padding}
        return {"padding": {name: round(float(share), 3) for name, share in padding.items()}}
    return {}


def run(bench: Bench, name: str) -> None:
    """Train, and write what was measured."""
    from mrope.hf import SyncReport

    torch._dynamo.reset()  # lets go of the model before
    trained, _, how = name.partition("-")
    model = bench.build("flash_attention_2" if how == "flash" else "sdpa")
    if trained == "lora":
        model = add_adapters(model)
    clock = Clock(bench.warm_up)
    report = SyncReport(WATCHED, clock.ends[1], quiet=True)
    # Without a GPU the guard would watch, under which nothing compiles.
    trainer = bench.trainer(model, [clock, report] if ON_GPU else [clock])
    more = equip_trainer(bench, trainer, how)
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    loss = trainer.train().training_loss
    memory = torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else 0.0
    found = {
        "run": name,
        "ms": round(1e3 * clock.seconds, 1),
        "samples_per_s": round(BATCH / clock.seconds, 2),
        "memory_gib": round(memory, 1),
        "syncs": report.count / WATCHED,
        "loss": round(loss, 5),
        "first_steps_s": round(clock.marks[0] - began, 1),
        "last_ms": round(1e3 * clock.last_seconds, 1),
    }
    if trained == "full":
        found["utilisation"] = round(utilisation(bench.tflop(), 1e3 * clock.seconds), 4)
    cell.write(found | more)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--runs", default=RUNS)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--epochs-before", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no run after them")
    given = parser.parse_args()
    began = time.monotonic()
    os.environ["PEERS_OUT"] = str(given.out)
    cell.write_versions("8b", "transformers", "accelerate", "peft", "triton", "numpy")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), given.model, given.epochs_before)
        tokens = sum(len(row["input_ids"]) for row in bench.sizes)
        patches = sum(int(np.prod(grid)) for row in bench.sizes for grid in row["image_grid_thw"])
        size = {"tokens": tokens * BATCH / ROWS, "patches": patches * BATCH / ROWS}
        size["epochs_before"] = given.epochs_before
        cell.write({"batch": BATCH, "tflop": round(bench.tflop(), 2), **size})
        for name in given.runs.split(","):
            if time.monotonic() - began < given.seconds:
                cell.attempt({"name": "8b"}, name, partial(run, bench, name))


if __name__ == "__main__":
    main()
