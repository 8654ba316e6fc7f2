"""Which axis of `position_ids` is the batch: model layout (3|4, B, S), batch layout (B, 3|4, S).

Models take the first. Whatever cuts or joins batches on dim 0 needs the second: accelerate's
dispatcher, `nn.DataParallel`, RL trainers. A shape alone does not tell them apart where B is 3 or
4, so that a batch in batch layout carries the key `batch_first`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from mrope.columns import Columns, NewColumns
from mrope.errors import MRopeError

Layout = Literal["model", "batch"]
BATCH_FIRST = "batch_first"


def to_batch_layout(batch: Columns) -> NewColumns:
    """Return the batch with `position_ids` (B, 3|4, S), and `batch_first`, bool (B,), beside it.

    The key `batch_first` marks the layout. Its value has one entry for each row, so that code that
    cuts or joins batches on dim 0 keeps it. 1-D `position_ids` (B, S) stay as they are.
    """
    if BATCH_FIRST in batch or batch["position_ids"].ndim == 2:
        return dict(batch)
    position_ids = batch["position_ids"].transpose(0, 1).contiguous()
    mark = torch.ones(len(position_ids), dtype=torch.bool)
    return {**batch, "position_ids": position_ids, BATCH_FIRST: mark}


def to_model_layout(batch: Columns) -> NewColumns:
    """Return the batch as models take it: `position_ids` (3|4, B, S), without `batch_first`.

    A view, without a copy or a sync; of a batch in model layout the dict alone is copied.
    Models that are not `attach`ed get it in front of their forward:

        model.register_forward_pre_hook(
            lambda module, args, kwargs: (args, to_model_layout(kwargs)), with_kwargs=True
        )
    """
    inputs = dict(batch)
    if inputs.pop(BATCH_FIRST, None) is not None:
        inputs["position_ids"] = inputs["position_ids"].transpose(0, 1)
    return inputs


class CheckedBatch(dict[str, Any]):
    """A batch that refuses to be cut or joined where that would tear its tensors apart.

    accelerate's dispatcher, and everything else that maps over a batch and keeps its type, makes
    the new one from the type of the old one; it is looked at there. Only shapes are read, never
    what a tensor holds: it may be on a device, or not be filled yet.

    Raises:
        MRopeError: `position_ids` in model layout that no longer fit the tokens, or pixels that are
            about to be dispatched.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        _check_positions(self)
        _refuse_dispatched_pixels(self)


def _check_positions(batch: Columns) -> None:
    ids, positions = batch.get("input_ids"), batch.get("position_ids")
    if not (isinstance(ids, torch.Tensor) and isinstance(positions, torch.Tensor)):
        return
    if positions.shape == ids.shape:
        return  # 1-D: the batch is in front in both
    axes = (1, 0) if BATCH_FIRST in batch else (0, 1)
    rows, width = positions.shape[axes[1]], positions.shape[-1]
    if positions.shape[axes[0]] in (3, 4) and (rows, width) == tuple(ids.shape[:2]):
        return
    raise MRopeError(
        f"position_ids {tuple(positions.shape)} do not fit input_ids {tuple(ids.shape)}: something "
        "(accelerate's dispatcher, for one) cut or joined the batch on dim 0, which is not the "
        "batch in position_ids; give MRopeCollator(layout='batch') (rope.layout: batch), or "
        "dispatch_batches=False"
    )


def _refuse_dispatched_pixels(batch: Columns) -> None:
    """Refuse what accelerate's dispatcher describes to the other processes before it cuts it."""
    for name in ("pixel_values", "pixel_values_videos"):
        if type(batch.get(name)).__name__ == "TensorInformation":
            raise MRopeError(
                f"accelerate is about to dispatch a batch with {name}, and to cut it on dim 0, "
                "which is patches there and not the batch: no layout helps; let each process load "
                "its own batches (dispatch_batches=False)"
            )
