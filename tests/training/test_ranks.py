"""Two gloo ranks under torchrun: DDP and FSDP2, with batches by tokens and by work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from training.runs import config, losses_of

LAYERS = ["Qwen3VLTextDecoderLayer", "Qwen3VLVisionBlock"]
SHARDED = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": LAYERS}}
ROOT = Path(__file__).parents[2]


def on_two_ranks(folder: Path, name: str, module: str, **trainer: object) -> list[float]:
    """Train 3 steps of `mrope train` on two ranks; return the losses."""
    cfg = config(
        folder,
        dataloader={"max_tokens": 150, "balance": "work"},
        rope={"packing": "flatten"},
        trainer={"max_steps": 3, "output_dir": name, **trainer},
    )
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(json.loads(cfg.model_dump_json(exclude_defaults=True))))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*words, "-m", module, "train", str(file)],
        env={
            "PYTHONPATH": f"{ROOT}/src:{ROOT}/tests",
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
        },
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "3 steps in" in done.stdout and done.stdout.count("3 steps in") == 1
    return losses_of(folder / name / "checkpoint-3")


def test_ddp_and_fsdp2_take_the_same_steps(tmp_path: Path) -> None:
    ddp = on_two_ranks(tmp_path, "ddp", "mrope")
    assert len(set(ddp)) == 3
    sharded = on_two_ranks(tmp_path, "fsdp", "training.fsdp_on_cpu", **SHARDED)
    assert sharded == pytest.approx(ddp, rel=1e-5)
