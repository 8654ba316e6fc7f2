"""Rows that a processor made, as tables keep them: budgets count, and models get, what the collator collates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml

from mrope.training.config import build_collator, load_config
from mrope.training.dataloader import load_rows, make_loader

IDS = [7, 3, *[5] * 4, 8]
APART = [7, 3, *[5] * 4, 9, 3, *[5] * 8, 8]


def config_of(folder: Path, row: dict[str, Any], base: str = "qwen2_5_vl", **sections: Any) -> Any:
    """Return a config over 40 of these rows, kept as Parquet."""
    datasets.Dataset.from_list([row] * 40).to_parquet(folder / "rows.parquet")
    table = yaml.safe_load(Path(f"configs/{base}.yaml").read_text())
    table |= {"data": {"source": str(folder / "rows.parquet")}, **sections}
    (folder / "config.yaml").write_text(yaml.safe_dump(table))
    return load_config(str(folder / "config.yaml"))


def pixels(patches: int, width: int = 1176, seed: int = 0) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    table: list[list[float]] = rng.normal(size=(patches, width)).astype(np.float32).tolist()
    return table


IMAGE = {"image_grid_thw": [[1, 4, 4]], "pixel_values": pixels(16)}
PADDED = [1, 2, 9] + [0] * 97
MASK = [1] * 3 + [0] * 97
ROWS: dict[str, dict[str, Any]] = {
    "ids (1, n)": {"input_ids": [IDS], "labels": [IDS], **IMAGE},
    "a grid (3,)": {"input_ids": IDS, "labels": IDS, **IMAGE, "image_grid_thw": [1, 4, 4]},
    "padded on the right": {"input_ids": PADDED, "labels": PADDED, "attention_mask": MASK},
    "padded on the left": {
        "input_ids": PADDED[::-1], "labels": PADDED[::-1], "attention_mask": MASK[::-1]
    },
    "pixels of each image": {
        "input_ids": APART, "labels": APART, "image_grid_thw": [[1, 4, 4], [1, 4, 8]],
        "pixel_values": [pixels(16), pixels(32)],
    },
    "pixels of equal images": {
        "input_ids": [*IDS, *IDS], "labels": [*IDS, *IDS], "image_grid_thw": [[1, 4, 4]] * 2,
        "pixel_values": [pixels(16), pixels(16)],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_batches_stay_within_the_budgets(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    limits = {"max_tokens": 64} | ({"max_patches": 96} if "pixel_values" in row else {})
    cfg = config_of(
        tmp_path, row, dataloader={**limits, "num_workers": 0}, rope={"packing": "flatten"}
    )
    loader = make_loader(cfg, load_rows(cfg), build_collator(cfg))
    batch = next(iter(loader))
    tokens, patches = batch["input_ids"].shape[1], len(batch.get("pixel_values", ()))
    assert tokens <= 64 and patches <= 96
    # As many rows in a batch as fit; the sampler plans windows of rows, and may end one early.
    valid = sum(row.get("attention_mask", [1] * np.size(row["input_ids"])))
    each = patches // len(batch["rope_deltas"])
    fit = min(64 // valid, 96 // each if each else 64)
    assert len(loader) - -(-40 // fit) in (0, 1)


@pytest.mark.parametrize("second", [32, 16])
def test_the_model_gets_the_pixels_of_each_image(second: int, tmp_path: Path) -> None:
    first, last = pixels(16, seed=1), pixels(second, seed=2)
    ids = APART if second == 32 else [*IDS, *IDS]
    row = {"input_ids": ids, "labels": ids, "pixel_values": [first, last]}
    row |= {"image_grid_thw": [[1, 4, 4], [1, 4, second // 4]]}
    cfg = config_of(tmp_path, row, dataloader={"batch_size": 2, "num_workers": 0})
    batch = next(iter(make_loader(cfg, load_rows(cfg), build_collator(cfg))))
    assert torch.equal(batch["pixel_values"], torch.tensor([*first, *last] * 2))
