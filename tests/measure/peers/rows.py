"""Write the rows of the cases for every peer: token ids, labels, grids, and pixels in bfloat16.

    PYTHONPATH=src:tests python -m measure.peers.rows FOLDER CASE,CASE

A case is a config of configs/bench/, or the path of another.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

BATCHES = 8


def config_file(case: str) -> str:
    return case if case.endswith(".yaml") else f"configs/bench/{case}.yaml"


def write_case(folder: Path, case: str) -> None:
    # Here, as the environments of other peers have nothing that reads a training config.
    from mrope.training.config import load_config, model_table
    from mrope.training.dataloader import load_rows

    cfg = load_config(config_file(case), ["dataloader.num_workers=0"])
    torch.manual_seed(0)
    rows: Any = load_rows(cfg)
    size = cfg.dataloader.batch_size
    kept = [dict(rows[index]) for index in range(BATCHES * size)]
    config = dict(model_table(cfg.model.config))
    torch.save({"config": config, "size": size, "rows": kept}, folder / f"{Path(case).stem}.pt")


def load_case(folder: Path, case: str) -> dict[str, Any]:
    """Return a case's config, rows of a batch, and batches: each a list of rows."""
    found = torch.load(folder / f"{Path(case).stem}.pt", weights_only=False)
    size, rows = found["size"], found["rows"]
    batches = [rows[at : at + size] for at in range(0, len(rows), size)]
    return {"name": Path(case).stem, "config": found["config"], "batches": batches}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for one in sys.argv[2].split(","):
        write_case(target, one)
