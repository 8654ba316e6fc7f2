"""Convert batches to the names and shapes that other trainers expect, one pure function each.

Every adapter takes a batch of `MRopeCollator` in model layout and returns a new dict; its argument
is not changed. Docstrings name the release whose source was read; docs/contributors/reliability.md
states what was run.

Shape suffixes: B rows and S width of a padded batch, T tokens of a flattened one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mrope.collate.layouts import BATCH_FIRST, to_batch_layout
from mrope.collate.values import as_tensor, plain
from mrope.columns import Columns, NewColumns
from mrope.errors import MRopeError
from mrope.spec.spec import MRopeSpec
from mrope.towers import VisionSpec, vision_tensors

_BORDERS = "cu_seq_lens_q"
# Keys of `vision_tensors` that VeOmni's towers read, and their names there.
_VEOMNI_NAMES = {
    "cu_seqlens": "cu_seqlens",
    "max_seqlen": "max_seqlen",
    "window_index": "window_index",
    "cu_window_seqlens": "cu_window_seqlens",
    "max_window_seqlen": "win_max_seqlen",
}


def to_ms_swift(batch: Columns) -> NewColumns:
    """Split `position_ids` into `position_ids` (3, B, S) and `text_position_ids` for ms-swift.

    ms-swift's trainers pop `text_position_ids` before the model is called, and find the borders of
    examples in it for losses and accuracies per example.

    Flattened batches: `text_position_ids` int64 (1, T) restarts at every example, `position_ids`
    becomes (3, 1, T). The borders are already there under the names that ms-swift uses;
    `max_length_q` stays an int, where ms-swift's own is a tensor. Requires flash attention: without
    the text row, sdpa and eager attention attend across examples. ms-swift refuses these two when
    `padding_free` or `packing` is set.

    Padded batches: `text_position_ids` int64 (B, S) is the column index, padding included.

    Source: ms-swift 4.6.0, swift/template/templates/qwen.py, `Qwen2VLTemplate._data_collator`;
    swift/trainers/seq2seq_trainer.py, `Seq2SeqTrainer.compute_loss`; swift/arguments/sft_args.py,
    `_check_padding_free`.

    Raises:
        MRopeError: `position_ids` are missing, of another shape, or in batch layout.
    """
    positions = _positions(batch, "to_ms_swift")
    if _BORDERS in batch:
        text, spatial = positions[0], positions[1:]
    else:
        # Padded batches have no text row; ms-swift uses the column index.
        _, rows, width = positions.shape
        text, spatial = torch.arange(width).repeat(rows, 1), positions
    return {**batch, "position_ids": spatial, "text_position_ids": text}


def to_verl(batch: Columns) -> NewColumns:
    """Convert `position_ids` of a padded batch to int64 (B, 4, S), text row first, for verl.

    The text row counts the valid tokens of its row from 0 and holds 1 at padding. verl removes
    padding by `attention_mask` and passes (4, 1, T) or (4, B, S) to the model. The result is in
    batch layout and has the key `batch_first`, which verl ignores.

    Source: verl 0.9.1, verl/experimental/agent_loop/agent_loop.py, `_compute_position_ids`;
    verl/workers/utils/padding.py, `left_right_2_no_padding`; verl/workers/engine/fsdp/
    transformer_impl.py, `FSDPEngineWithLMHead.prepare_model_inputs`.

    Raises:
        MRopeError: a flattened batch, or one without `attention_mask`; several examples in a row;
            `position_ids` are missing, of another shape, or in batch layout.
    """
    positions_3BS = _positions(batch, "to_verl")
    if _BORDERS in batch:
        raise MRopeError(
            "to_verl takes padded batches, but this one is flattened (cu_seq_lens_q): verl removes "
            "padding itself; leave out MRopeCollator(packing='flatten')"
        )
    if batch.get("attention_mask") is None:
        raise MRopeError("to_verl needs attention_mask (B, S): verl finds padding only by it")
    mask_BS = torch.as_tensor(batch["attention_mask"])
    if bool((mask_BS > 1).any()):
        raise MRopeError(
            f"attention_mask counts up to {int(mask_BS.max())}: several examples in a row, which "
            "verl would treat as one; use one row per example"
        )
    valid_BS = mask_BS != 0
    text_BS = (valid_BS.cumsum(1) - 1).masked_fill(~valid_BS, 1)
    return to_batch_layout({**batch, "position_ids": torch.cat((text_BS[None], positions_3BS))})


def to_veomni(batch: Columns, spec: MRopeSpec, vision: VisionSpec) -> NewColumns:
    """Add `multimodal_metadata`, `image_mask` and `video_mask` to a flattened batch, for VeOmni.

    `multimodal_metadata` spares VeOmni's vision towers syncs with the device. For images, and
    likewise for videos, it holds:

    - `image_grid_thw_list`: the grids as lists of three ints.
    - `vit_image_cu_seqlens` int32 (frames + 1,), `vit_image_max_seqlen` int: the frames' borders.
    - `vit_image_window_index` int64 (M,), `vit_image_cu_window_seqlens` int32 (windows + 1,),
      `vit_image_win_max_seqlen` int: with `vision.window_side`.

    A batch without pixels has no `multimodal_metadata`. `image_mask` and `video_mask`, bool (1, T),
    mark placeholders; VeOmni's Qwen2-VL and Qwen2.5-VL require them. `position_ids` stay (4, 1, T):
    VeOmni's models also take their own (1, 3, T), but with these sdpa and eager attention attend
    across examples.

    All of it follows from grids and tokens, so the collator needs no `vision`.

    Args:
        batch: a flattened batch, `MRopeCollator(packing="flatten")`.
        spec: the model's token ids.
        vision: the vision tower's values.

    Source: VeOmni 0.1.12, veomni/models/transformers/<family>/generated/*_gpu.py: written by
    `collate_multimodal_metadata`, read by the model's `forward`; veomni/data/data_transform.py,
    `_process_sample_qwen_vl_base`.

    Raises:
        MRopeError: a padded batch; `position_ids` are missing, of another shape, or in batch
            layout; wrong grids.
    """
    _positions(batch, "to_veomni")
    if _BORDERS not in batch:
        raise MRopeError(
            "to_veomni takes flattened batches, but this one has no cu_seq_lens_q: VeOmni's models "
            "take one row without padding; use MRopeCollator(packing='flatten')"
        )
    metadata: NewColumns = {}
    for modality in ("image", "video"):
        metadata |= _tower_metadata(modality, batch.get(f"{modality}_grid_thw"), vision)
    # An inner collate function may have left arrays or lists.
    ids = as_tensor("input_ids", plain(batch["input_ids"]))
    masks = {"image_mask": ids == spec.image_token_id, "video_mask": ids == spec.video_token_id}
    return {**batch, **masks} | ({"multimodal_metadata": metadata} if metadata else {})


def _tower_metadata(modality: str, grid_thw: Any, vision: VisionSpec) -> NewColumns:
    """Compute the entries of `multimodal_metadata` for one modality; empty without grids."""
    # Without the table: VeOmni's towers interpolate it in their forward.
    tensors = vision_tensors(replace(vision, table_side=None), grid_thw)
    if not tensors:
        return {}
    metadata: NewColumns = {f"{modality}_grid_thw_list": np.asarray(grid_thw).tolist()}
    for name, value in tensors.items():
        if name in _VEOMNI_NAMES:
            entry = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            metadata[f"vit_{modality}_{_VEOMNI_NAMES[name]}"] = entry
    return metadata


def _positions(batch: Columns, adapter: str) -> torch.Tensor:
    """Return `position_ids`: (4, 1, T) of a flattened batch, (3, B, S) of a padded one."""
    if BATCH_FIRST in batch:
        raise MRopeError(
            f"{adapter} takes model layout, but the batch is in batch layout ({BATCH_FIRST}); give "
            "MRopeCollator(layout='model'), or to_model_layout(batch)"
        )
    positions = batch.get("position_ids")
    rows, width = (4, "(4, 1, T)") if _BORDERS in batch else (3, "(3, B, S)")
    if isinstance(positions, torch.Tensor) and positions.ndim == 3 and len(positions) == rows:
        return positions
    found = tuple(positions.shape) if isinstance(positions, torch.Tensor) else "none"
    raise MRopeError(
        f"{adapter} needs the position_ids {width} of MRopeCollator, found {found}. Likely cause: "
        "the batch is of another collator, or was adapted already."
    )
