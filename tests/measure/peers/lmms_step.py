"""Measure transformers' Qwen3-VL under lmms-engine's patches, as its runner applies them.

    PYTHONPATH=src:tests python -m measure.peers.lmms_step ROWS CASE,CASE

`use_liger_kernel: true` and `use_rmpad: true`: Liger's fused linear cross entropy, norms, SwiGLU and rotary
embeddings; padding removed in the forward; positions by its numpy function, in the forward. Batches are padded,
as its collator makes them. Only the modules of Qwen3-VL are imported: the package's `models/__init__`
imports twenty families and all that they need. GPU only: Liger's kernels do not run on a CPU.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch

from measure.peers import cell
from measure.peers.cell import Case, attempt, on_device, stepper
from measure.peers.kernels import provide_flash_attn
from measure.peers.ours import build
from measure.peers.rows import load_case

_BARE = ("lmms_engine", "lmms_engine.utils", "lmms_engine.models")
_MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


def import_patcher() -> Any:
    """Import its patches of Qwen3-VL, without running the `__init__` of the packages around them."""
    found = importlib.util.find_spec("lmms_engine")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("lmms_engine", name="lmms_engine")
    root = Path(found.origin).parent
    for name in _BARE:
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = module
    importlib.import_module("lmms_engine.models.qwen3_vl.monkey_patch")  # registers them
    from lmms_engine.models.monkey_patch import MONKEY_PATCHER

    return MONKEY_PATCHER


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Join rows of one width as lmms_engine/datasets/collator does: a mask, pixels and grids in one."""
    made = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}
    made["attention_mask"] = torch.ones_like(made["input_ids"])
    parts = {name: [row[name] for row in rows if name in row] for name in _MEDIA}
    return made | {name: torch.cat(found) for name, found in parts.items() if found}


def run(case: Case, patcher: Any) -> None:
    model = build(case, "flash_attention_2")
    patcher.apply_monkey_patch_to_instance(model, use_rmpad=True, patch_type=["liger", "rmpad"])
    batches = [on_device(collate(rows)) for rows in case["batches"]]
    cell.measure(case, "lmms-engine", stepper(model, model, batches, use_cache=False))


def main(folder: Path, files: list[str]) -> None:
    provide_flash_attn()
    cell.write_versions("lmms-engine", "lmms-engine", "transformers", "liger-kernel", "triton")
    patcher = import_patcher()
    for file in files:
        case = load_case(folder, file)
        attempt(case, "lmms-engine", partial(run, case, patcher))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","))
