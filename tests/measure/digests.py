"""What a digest of every batch costs a worker, beside what the worker does otherwise.

    PYTHONPATH=src:tests python tests/measure/digests.py [--json FILE]

A worker decodes JPEG files, runs transformers' image processor of Qwen3-VL, and collates. Also beside
collating alone, with pixels and without: the least that a worker can do.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from mrope import MRopeCollator, MRopeSpec, VisionSpec
from mrope.bench.harness import conditions, one_thread, write_json
from mrope.collate.digests import DigestCollator
from mrope.spec.spec import example_config

CONFIG = example_config("qwen3_vl")
SPEC = MRopeSpec.from_config(CONFIG, "transformers-5.23")
VISION = VisionSpec.from_config(CONFIG)


def jpegs(count: int, width: int, height: int) -> list[bytes]:
    """Return photographs' worth of JPEG: smooth noise, at quality 90."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        coarse = rng.integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        picture.save(file, "jpeg", quality=90)
        made.append(file.getvalue())
    return made


def load(files: list[bytes], processor: Any, text: int) -> dict[str, Any]:
    """Decode pictures, and return the row of a conversation with them."""
    pictures = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    made = processor(pictures, return_tensors="pt")
    ids = [7] * text
    for grid in made["image_grid_thw"].tolist():
        ids += [SPEC.vision_start_token_id, *[SPEC.image_token_id] * (np.prod(grid) // 4), 9]
    return {"input_ids": torch.tensor(ids), **made}


def milliseconds(function: Callable[[], Any], repeats: int) -> float:
    function()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        taken.append((time.perf_counter() - start) * 1e3)
    return median(taken)


def measure(rows: int, images: int, text: int) -> dict[str, Any]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(patch_size=16)
    files = jpegs(images, 1024, 768)
    loaded = [load(files, processor, text) for _ in range(rows)]
    found: dict[str, Any] = {"rows": rows, "images": images, "tokens": len(loaded[0]["input_ids"])}
    loading = milliseconds(lambda: load(files, processor, text), 5) * rows
    for packing in (None, "flatten"):
        options: Any = {"packing": packing} if packing else {}
        found[packing or "padded"] = beside(
            MRopeCollator(None, SPEC, VISION, **options), loaded, loading
        )
    return found


def beside(collate: Any, loaded: list[dict[str, Any]], loading: float) -> dict[str, float]:
    """Return what a digest costs beside loading and collating rows."""
    batch = collate(loaded)
    collating = milliseconds(partial(collate, loaded), 20)
    without = [{k: v for k, v in row.items() if k != "pixel_values"} for row in loaded]
    with TemporaryDirectory() as folder:
        record = DigestCollator(lambda _: batch, Path(folder) / "digests.jsonl")
        recording = milliseconds(partial(record, None), 200)
    return {
        "load_ms": round(loading, 2),
        "collate_ms": round(collating, 3),
        "collate_without_pixels_ms": round(milliseconds(partial(collate, without), 50), 3),
        "digest_ms": round(recording, 4),
        "share_of_worker": round(recording / (loading + collating), 5),
        "share_of_collating": round(recording / collating, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with one_thread():
        cases = [measure(2, 4, 500), measure(8, 1, 500), measure(16, 1, 100)]
    report = {"conditions": conditions(), "cases": cases}
    for case in cases:
        print(case)
    write_json(report, arguments.json)


if __name__ == "__main__":
    main()
