"""Train on 2,000 photographs of 1 to 12 megapixels, and measure the start, the memory and the disk.

    PYTHONPATH=src:tests python tests/measure/train_photographs.py [ROWS] [STEPS]

Run by `make slow`. JPEGs, and conversations that name them by path, are written into a temporary
folder. A small model trains on batches up to a token budget, so that the sizes of all rows are
counted first, twice: once without the file of sizes, once with it. Fails if the first step takes
more than a minute, if memory of the process and its workers grows by more than 15 % after the first
steps, or if anything but the table and the sizes is written.

Of the first step most is the start of the workers, each of which imports torch, transformers and
datasets. Spawned workers import this module too: so it imports none of them at its top.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

ROWS, STEPS, WARM_UP = 2000, 24, 8
MOST_SECONDS, MOST_GROWTH = 60, 1.15


def memory_of_all() -> float:
    """Return the resident memory of this process and its workers, in MiB."""
    me = psutil.Process()
    rss: int = sum(one.memory_info().rss for one in [me, *me.children(recursive=True)])
    return rss / 2**20


def make_rows(folder: Path, count: int) -> int:
    """Write JPEGs and conversations about them; return the bytes of all pictures."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (96, 128, 3), np.uint8))
    total = 0
    with (folder / "rows.jsonl").open("w") as lines:
        for number in range(count):
            pixels, ratio = rng.uniform(1e6, 12e6), rng.uniform(0.6, 1.7)
            size = int((pixels * ratio) ** 0.5), int((pixels / ratio) ** 0.5)
            # Scaled noise: quick to make, and as large as photographs are.
            noise.resize(size, Image.Resampling.BILINEAR).save(folder / f"{number}.jpg")
            total += (folder / f"{number}.jpg").stat().st_size
            asked = [{"type": "image"}, {"type": "text", "text": "What is shown?"}]
            answer = {"role": "assistant", "content": [{"type": "text", "text": "Noise."}]}
            talk = [{"role": "user", "content": asked}, answer]
            lines.write(json.dumps({"messages": talk, "images": [f"{number}.jpg"]}) + "\n")
    return total


def train_once(folder: Path, steps: int) -> dict[str, Any]:
    from mrope import load_config
    from mrope.training import trainer as training

    own, started = training.StageTrainer, time.perf_counter()
    seconds: list[float] = []
    memory: list[float] = []

    class Watched(own):  # type: ignore[misc, valid-type]
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            seconds.append(time.perf_counter() - started)
            memory.append(memory_of_all())
            return loss

    demo = Path(__file__).parents[2] / "configs" / "demo.yaml"
    changes = [
        f"data={{source: {folder / 'rows.jsonl'}, rows: null, max_pixels: 200000}}",
        "rope={vision: true, packing: flatten}",
        "dataloader={max_tokens: 1024, num_workers: 2, batch_size: 4}",
        f"trainer={{max_steps: {steps}, output_dir: {folder / 'out'}, save_strategy: 'no'}}",
    ]
    cfg = load_config(demo, changes)
    training.StageTrainer = Watched  # type: ignore[misc]
    try:
        training.train(cfg)
    finally:
        training.StageTrainer = own  # type: ignore[misc]
    early, late = max(memory[:WARM_UP]), max(memory[WARM_UP:])
    return {"first_step_s": seconds[0], "memory_mib": [early, late]}


def files_of(folder: Path) -> int:
    return sum(one.stat().st_size for one in folder.rglob("*") if one.is_file())


def main(words: list[str]) -> int:
    given = [int(word) for word in words]
    count, steps = (*given, ROWS, STEPS)[0], (*given[1:], STEPS)[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
        pictures = make_rows(folder, count)
        before = files_of(folder)
        runs = [train_once(folder, steps) for _ in range(2)]
        sizes, table = files_of(folder / ".mrope_sizes"), files_of(folder / "datasets")
        rest = files_of(folder) - before - sizes - table
    report = {"rows": count, "pictures_mib": pictures / 2**20, "runs": runs}
    report |= {"sizes_bytes": sizes, "table_bytes": table, "other_bytes": rest}
    print(json.dumps(report, indent=1))
    quick = all(run["first_step_s"] < MOST_SECONDS for run in runs)
    flat = all(run["memory_mib"][1] < MOST_GROWTH * run["memory_mib"][0] for run in runs)
    lean = sizes < 64 * count + 1000 and rest == 0
    return 0 if quick and flat and lean else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
