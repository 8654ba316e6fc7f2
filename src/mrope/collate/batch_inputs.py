"""Read the arguments of position ids from a batch of torch tensors and from its examples."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mrope.collate.complete import are_rows, complete
from mrope.collate.packing import refuse_packed, seq_lengths
from mrope.collate.samples import SECONDS, read_column
from mrope.errors import MRopeError
from mrope.positions.inputs import BatchInputs, check_inputs
from mrope.spec.spec import MRopeSpec

_COLUMNS = ("attention_mask", "image_grid_thw", "video_grid_thw", "mm_token_type_ids")
_PER_SAMPLE = {
    "image_grid_thw": "images_per_sample",
    "video_grid_thw": "videos_per_sample",
    "target_sizes": "images_per_sample",
    "target_sizes_videos": "videos_per_sample",
}


def as_batch(batch: Any) -> MutableMapping[str, Any]:
    """Return what an inner collate function made, if it is a mapping with `input_ids`.

    Raises:
        MRopeError: it is not.
    """
    if isinstance(batch, MutableMapping) and "input_ids" in batch:
        return batch
    keys = f" with {sorted(map(str, batch))}" if isinstance(batch, Mapping) else ""
    raise MRopeError(
        "the inner collate function must return a mapping with input_ids, "
        f"not {type(batch).__name__}{keys}"
    )


def read_inputs(
    spec: MRopeSpec, batch: MutableMapping[str, Any], examples: Any, flattened: bool
) -> BatchInputs:
    """Check and type the inputs of a batch, once.

    Args:
        batch: what the inner collate function returned; tensors on the CPU, arrays or lists. Types
            and seconds that only some examples have are completed in it.
        examples: what that function was given, to learn how many grids each row has.
        flattened: whether rows that hold several examples are allowed, and numbered apart.

    Raises:
        MRopeError: an input on a device, in bfloat16, or of a wrong shape, dtype or value.
    """
    arrays: dict[str, Any] = {"input_ids": _ids(batch["input_ids"])}
    complete(spec, batch, examples)
    for name in (*_COLUMNS, *_PER_SAMPLE.values(), *spec.family_row.inputs):
        value = batch.get(name)
        if value is not None:
            arrays[name] = value if isinstance(value, (bool, str)) else as_numpy(name, value)
    arrays |= _seconds(batch) | _audio_lengths(spec, batch)
    for grid, counts in _PER_SAMPLE.items():
        if grid in arrays and counts not in arrays:
            arrays[counts] = _count(examples, arrays["input_ids"], grid, arrays[grid])
    shape = arrays["input_ids"].shape
    if flattened:
        mask = arrays.get("attention_mask")
        arrays["seq_lengths"] = seq_lengths(batch, examples, shape, mask)
    else:
        refuse_packed(batch, examples, shape)
    return check_inputs(spec, **arrays)


def as_numpy(name: str, value: Any) -> npt.NDArray[Any]:
    """Return a value of the batch as an array, without a copy of a tensor.

    Raises:
        MRopeError: a tensor on a device or in bfloat16, or a ragged list.
    """
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise MRopeError(
                f"{name} is on {value.device}: collate functions must return CPU tensors"
            )
        if value.dtype == torch.bfloat16:
            raise MRopeError(f"{name} is bfloat16, too coarse to number tokens by; keep it float32")
        return value.detach().numpy()
    try:
        return np.asarray(value)
    except ValueError as error:
        raise MRopeError(f"{name} is ragged: {error}") from error


def _ids(value: Any) -> npt.NDArray[Any]:
    ids = as_numpy("input_ids", value)
    # Checked before anything that is read beside the ids, whose errors would be harder to place.
    if ids.ndim != 2:
        raise MRopeError(f"input_ids must have shape (B, S), not {ids.shape}")
    return ids


def _seconds(batch: Mapping[str, Any]) -> dict[str, Any]:
    given = [name for name in SECONDS if batch.get(name) is not None]
    if not given:
        return {}
    values = [as_numpy(name, batch[name]) for name in given]
    if len(values) == 2 and not np.array_equal(values[0], values[1]):
        raise MRopeError(f"{given[0]} and {given[1]} are both in the batch and differ")
    value = batch[given[0]]
    # torch multiplies a float64 tensor in float64; a list of Python floats becomes float32 first.
    wide = isinstance(value, torch.Tensor) and value.dtype == torch.float64
    return {"second_per_grid_ts": values[0]} | ({"seconds_dtype": np.float64} if wide else {})


def _audio_lengths(spec: MRopeSpec, batch: Mapping[str, Any]) -> dict[str, Any]:
    name = "feature_attention_mask"
    if "audio_seqlens" not in spec.family_row.inputs or batch.get(name) is None:
        return {}
    # The thinkers' forward takes lengths from this mask, whatever else it is given.
    return {"audio_seqlens": as_numpy(name, batch[name]).sum(axis=-1)}


def _count(
    examples: Any, ids: npt.NDArray[Any], name: str, grid_thw: npt.NDArray[Any]
) -> npt.NDArray[np.int64] | None:
    """Return how many grids each example carries, if the batch's grids are theirs in that order.

    An inner function that makes, drops, merges or reorders samples gives other grids or rows; then
    the examples say nothing about rows, and grids are checked over the whole batch.
    """
    if not are_rows(examples, ids):
        return None
    own = [read_column(name, example.get(name)) for example in examples]
    if all(value is None for value in own):
        return None
    try:
        grids = [
            np.empty((0, *grid_thw.shape[1:])) if value is None else np.asarray(value)
            for value in own
        ]
        together = np.concatenate(grids)
    except (TypeError, ValueError, RuntimeError):
        return None
    if not np.array_equal(together, grid_thw):
        return None
    return np.array([len(value) for value in grids])
