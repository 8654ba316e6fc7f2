"""Two gloo ranks under torchrun: DDP and FSDP2, with batches by tokens and by work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from training.runs import config, losses_of

LAYERS = ["Qwen3VLTextDecoderLayer", "Qwen3VLVisionBlock"]
SHARDED = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": LAYERS}}


def test_ddp_and_fsdp2_take_the_same_steps(tmp_path: Path) -> None:
    """Started once: two ranks import everything for longer than they train."""
    files = []
    for name, options in (("ddp", {}), ("fsdp", SHARDED)):
        cfg = config(
            tmp_path,
            dataloader={"max_tokens": 150, "balance": "work"},
            rope={"packing": "flatten"},
            trainer={"max_steps": 2, "output_dir": name, **options},
        )
        files.append(tmp_path / f"{name}.yaml")
        table = json.loads(cfg.model_dump_json(exclude_defaults=True))
        files[-1].write_text(yaml.safe_dump(table))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*words, "-m", "training.fsdp_on_cpu", *map(str, files)],
        env={"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.defpath, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 steps in") == 2  # of rank 0 alone, once for each run
    ddp, sharded = (losses_of(tmp_path / name / "checkpoint-2") for name in ("ddp", "fsdp"))
    assert len(set(ddp)) == 2
    assert sharded == pytest.approx(ddp, rel=1e-5)
