"""Measure VeOmni's own Qwen3-VL: its builder, its position function, its collator, its defaults.

    PYTHONPATH=src:tests python -m measure.peers.veomni_step ROWS CASE,CASE

One packed row of the examples, with their borders and `multimodal_metadata`, as its `MainCollator` makes it of
what `veomni/data/data_transform.py` returns. By default it runs Liger's fused linear cross entropy, RMSNorm
and rotary embedding, and FlashAttention 2 by a wrapper of its own. Its `compile_decoder_blocks`, off by
default, met the limit of recompilations on these batches.
"""

from __future__ import annotations

import os
import sys
import types
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch

from measure.peers import cell
from measure.peers.cell import DEVICE, DTYPE, ON_GPU, Case, attempt, on_device, stepper
from measure.peers.kernels import provide_flash_attn
from measure.peers.rows import load_case

# veomni.utils.constants: what its transform puts in place of placeholders until it has found them.
_KINDS = {"image": (-200, 1), "video": (-300, 2)}


def leave_out_datasets() -> None:
    """Let veomni.data be imported without the release of datasets that it pins; its readers are not used."""
    names = ("IterableDataset", "Dataset", "load_dataset", "interleave_datasets")
    for name, kept in (("datasets", names), ("datasets.distributed", ("split_dataset_by_node",))):
        module = types.ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None, is_package=True), []
        vars(module).update({one: type(one, (), {}) for one in kept})
        sys.modules[name] = module


def operators() -> Any:
    """Return its default kernels; on a CPU, for tests, those that need no GPU."""
    from veomni.arguments.arguments_types import OpsImplementationConfig

    if ON_GPU:
        return OpsImplementationConfig()
    parts = (
        "cross_entropy_loss",
        "rms_norm",
        "swiglu_mlp",
        "rotary_pos_emb",
        "load_balancing_loss",
    )
    named = {f"{part}_implementation": "eager" for part in parts}
    return OpsImplementationConfig(**named, moe_implementation="eager")


def build(case: Case) -> Any:
    from transformers import AutoConfig
    from veomni.distributed import parallel_state
    from veomni.models.auto import build_foundation_model

    # As its trainer registers one: without it every call makes a new one.
    if parallel_state._PARALLEL_STATE is None:
        parallel_state._PARALLEL_STATE = parallel_state.ParallelState()
    config = dict(case["config"])
    live = AutoConfig.for_model(config.pop("model_type"), **config)
    live.architectures = ["Qwen3VLForConditionalGeneration"]
    model = build_foundation_model(
        live,
        torch_dtype=str(DTYPE).removeprefix("torch."),
        init_device=DEVICE.type,
        ops_implementation=operators(),
    ).to(DEVICE)
    cell.draw_weights(model.named_parameters())
    return model.train()


def example(row: dict[str, Any], config: dict[str, Any], positions: Any) -> dict[str, Any]:
    """Make of a row what its `_process_sample_qwen_vl_base` makes of a tokenized conversation."""
    ids, kinds = row["input_ids"].clone(), torch.zeros_like(row["input_ids"])
    made: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "labels": row["labels"].clone()}
    for modality, (token, kind) in _KINDS.items():
        mask = made[f"{modality}_mask"] = row["input_ids"] == config[f"{modality}_token_id"]
        ids[mask], kinds[mask] = token, kind
    grids = {name: row.get(name) for name in ("image_grid_thw", "video_grid_thw")}
    found = positions(
        input_ids=ids[None],
        attention_mask=made["attention_mask"][None],
        mm_token_type_ids=kinds[None],
        **grids,
    )
    made["position_ids"] = found["position_ids"].squeeze().clone()
    made |= {"input_ids": ids.masked_fill(kinds > 0, 0), "mm_token_type_ids": kinds}
    media = ("pixel_values", "pixel_values_videos", *grids)
    return made | {name: row[name] for name in media if name in row}


def run(case: Case) -> None:
    from veomni.data.data_collator import MainCollator

    model = build(case)
    collate = MainCollator(metadata_collate_func=model.get_metadata_collate_func())
    positions = model.get_position_id_func()
    batches = [
        on_device(dict(collate([example(row, case["config"], positions) for row in rows])))
        for rows in case["batches"]
    ]
    cell.measure(case, "VeOmni", stepper(model, model, batches, use_cache=False))


def main(folder: Path, files: list[str]) -> None:
    os.environ.setdefault("VEOMNI_LOG_LEVEL", "WARNING")
    provide_flash_attn()
    leave_out_datasets()
    cell.write_versions("veomni", "veomni", "transformers", "liger-kernel", "triton")
    for file in files:
        case = load_case(folder, file)
        attempt(case, "VeOmni", partial(run, case))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","))
