"""Read the inputs of position ids out of a batch and its examples, or out of one row of a dataset.

Every reader of rows goes through here: the collator, `Precheck`, `mrope check` and the sampler of
`mrope train` agree on what a row is, and on how many tokens and patches it has.

Shape suffixes: B rows of the batch, N images, clips or audios.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mrope.arrays import as_array
from mrope.collate.samples import (
    PIXELS,
    as_tensor,
    read_column,
    read_sample,
    refuse_half_precision,
)
from mrope.collate.segments import refuse_packed, seq_lengths
from mrope.columns import COLUMNS, MODALITIES, columns, count_key
from mrope.errors import MRopeError
from mrope.positions.inputs import SECONDS, BatchInputs, check_inputs, reads_types
from mrope.positions.spans import token_types
from mrope.spec.spec import MRopeSpec

_TYPES = "mm_token_type_ids"
_SECONDS = tuple(columns("item", means="seconds"))
_MASKS = {COLUMNS[name].modality: name for name in columns("item", means="mask")}
_SIZES = {one: tuple(columns("item", modality=one, means="size")) for one in MODALITIES}


class Rows:
    """The examples of a batch, if they are its rows: each column of theirs is read once.

    An inner collate function that makes, drops or merges samples gives other rows: then the
    examples say nothing about them.

    Args:
        examples: what the inner collate function was given.
        input_ids: of the batch that it made.
    """

    def __init__(self, examples: Any, input_ids: Any) -> None:
        are_rows = (
            isinstance(examples, Sequence)
            and np.ndim(input_ids) > 0  # otherwise refused with the inputs
            and len(examples) == len(input_ids)
            and all(isinstance(example, Mapping) for example in examples)
        )
        self.examples: Sequence[Mapping[str, Any]] | None = examples if are_rows else None
        self._read: dict[str, list[Any] | None] = {}

    def of(self, name: str) -> list[Any] | None:
        """Return a column's value in each row, None where it is absent; None if it is in no row."""
        if name not in self._read:
            self._read[name] = self._column(name)
        return self._read[name]

    def _column(self, name: str) -> list[Any] | None:
        if self.examples is None or not any(name in example for example in self.examples):
            return None
        values: list[Any] = []
        try:
            for example in self.examples:
                values.append(read_column(name, example.get(name)))  # noqa: PERF401 - counted
        except MRopeError as error:
            raise MRopeError(f"row {len(values)}: {error}") from None
        return values if any(value is not None for value in values) else None


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
    spec: MRopeSpec, batch: MutableMapping[str, Any], rows: Rows, apart: bool
) -> BatchInputs:
    """Check and type the inputs of a batch, once.

    Args:
        batch: what the inner collate function returned; tensors on the CPU, arrays or lists. Types
            and seconds that only some rows have are completed in it, as each of the others would
            have them alone.
        rows: of what that function was given, to learn what belongs to each row.
        apart: whether rows may hold several examples, which are numbered apart.

    Raises:
        MRopeError: an input on a device, at half precision, or of a wrong shape, dtype or value.
    """
    given, wide = read_arguments(spec, batch, rows, apart)
    return check_inputs(spec, given, np.float64 if wide else np.float32)


def read_arguments(
    spec: MRopeSpec, batch: MutableMapping[str, Any], rows: Rows, apart: bool
) -> tuple[dict[str, Any], bool]:
    """Return the arguments of `rope_index` in a batch, and whether seconds are in float64.

    Args:
        batch, rows, apart: as of `read_inputs`.

    Raises:
        MRopeError: as `read_inputs`, but shapes, dtypes and values are not checked.
    """
    ids = as_numpy("input_ids", batch["input_ids"])
    # Checked before anything that is read beside the ids, whose errors would be harder to place.
    if ids.ndim != 2:
        raise MRopeError(f"input_ids must have shape (B, S), not {ids.shape}")
    _complete_types(spec, batch, rows)
    given: dict[str, Any] = {"input_ids": ids}
    for name in _names_read(spec):
        value = batch.get(name)
        if value is not None:
            given[name] = value if isinstance(value, (bool, str)) else as_numpy(name, value)
    _read_lengths(given)
    given |= _counts(spec, given, rows)
    wide = _read_seconds(spec, given, batch, rows)
    if apart:
        lengths = seq_lengths(batch, rows.examples, ids.shape, given.get("attention_mask"))
        given["seq_lengths"] = lengths
    else:
        refuse_packed(batch, rows.examples, ids.shape)
    return given, wide


@lru_cache(maxsize=64)
def _names_read(spec: MRopeSpec) -> tuple[str, ...]:
    """Return the columns that a family's position ids are computed from, beside the ids."""
    names = {"attention_mask", _TYPES, *spec.family_row.inputs}
    names.update(name for of in _SIZES.values() for name in of if COLUMNS[name].sides == 3)
    names.update(count_key(modality) for modality in ("image", "video"))
    if _SIZES["audio"][0] in names:
        names.update(_MASKS.values())
    return tuple(sorted(names - {*_SECONDS}))


def as_numpy(name: str, value: Any) -> npt.NDArray[Any]:
    """Return a value of the batch as an array, without a copy of a tensor.

    Raises:
        MRopeError: a tensor on a device or at half precision, or a ragged list.
    """
    if not isinstance(value, torch.Tensor):
        return as_array(name, value, "numbers")
    if value.device.type != "cpu":
        raise MRopeError(f"{name} is on {value.device}: collate functions must return CPU tensors")
    refuse_half_precision(name, value)
    return value.detach().numpy()


def _read_lengths(given: dict[str, Any]) -> None:
    """Put lengths in the place of masks, in place."""
    for modality, name in _MASKS.items():
        if name in given:
            given[_SIZES[str(modality)][0]] = np.atleast_1d(given.pop(name).sum(axis=-1))


def _counts(spec: MRopeSpec, given: Mapping[str, Any], rows: Rows) -> dict[str, Any]:
    """Return how many images, clips and audios each row has, if those of the batch are theirs."""
    found: dict[str, Any] = {}
    for modality, names in _SIZES.items():
        key = count_key(modality)
        name = next((one for one in names if one in given), None)
        if name is None or key in given:
            continue
        counts = _count(rows, name, given[name])
        if counts is not None and (modality != "audio" or key in spec.family_row.inputs):
            found[key] = counts
    return found


def _count(rows: Rows, name: str, sizes: npt.NDArray[Any]) -> npt.NDArray[np.int64] | None:
    """Return how many sizes each row has, if the batch's are theirs in that order.

    Otherwise sizes are checked over the whole batch.
    """
    mask = _MASKS.get(COLUMNS[name].modality)
    masks = None if mask is None else rows.of(mask)
    own = rows.of(name) if masks is None else [_sums(one) for one in masks]
    if own is None:
        return None
    try:
        parts = [np.empty((0, *sizes.shape[1:])) if one is None else np.asarray(one) for one in own]
        together = np.concatenate(parts)
    except (TypeError, ValueError, RuntimeError):
        return None
    return np.array(list(map(len, parts))) if np.array_equal(together, sizes) else None


def _sums(mask: Any) -> npt.NDArray[Any] | None:
    return None if mask is None else np.atleast_1d(np.asarray(mask).sum(axis=-1))


def _read_seconds(
    spec: MRopeSpec, given: dict[str, Any], batch: MutableMapping[str, Any], rows: Rows
) -> bool:
    """Read the seconds of clips, by either name; return whether they are multiplied in float64."""
    names = [name for name in _SECONDS if batch.get(name) is not None]
    if not names:
        return False
    if spec.family_row.timed and isinstance(batch[names[0]], torch.Tensor):
        for name in names:
            batch[name] = _completed(batch[name], rows.of(name), given.get(count_key("video")))
    values = [as_numpy(name, batch[name]) for name in names]
    if len(values) == 2 and not np.array_equal(values[0], values[1]):
        raise MRopeError(f"{names[0]} and {names[1]} are both present and differ")
    given[SECONDS] = values[0]
    # torch multiplies a float64 tensor in float64; a list of Python floats becomes float32 first.
    value = batch[names[0]]
    return isinstance(value, torch.Tensor) and value.dtype == torch.float64


def _completed(given: Any, own: list[Any] | None, clips_B: Any) -> Any:
    """Return seconds with 1.0 for clips of rows that have none.

    That is what the reference takes for a batch without any.
    """
    if own is None or clips_B is None or all(one is not None for one in own):
        return given
    parts, found = [], 0
    for seconds, clips in zip(own, np.asarray(clips_B).tolist(), strict=True):
        count = 0 if seconds is None else len(seconds)
        parts.append(given[found : found + count] if count else given.new_ones(clips))
        found += count
    # Otherwise the inner function made or dropped seconds of its own.
    return torch.cat(parts) if given.ndim == 1 and found == len(given) else given


def _complete_types(spec: MRopeSpec, batch: MutableMapping[str, Any], rows: Rows) -> None:
    """Give rows that came without types those of their placeholder tokens.

    `mm_token_type_ids` that the inner collate function filled with zeros, in families whose types
    follow from the tokens.
    """
    if not isinstance(batch.get(_TYPES), torch.Tensor) or not reads_types(spec):
        return
    own = rows.of(_TYPES)
    # All lack it: the inner function made the types, and they are checked as they are.
    if own is None or all(types is not None for types in own):
        return
    ids, types = (torch.as_tensor(batch[name]) for name in ("input_ids", _TYPES))
    mask = batch.get("attention_mask")
    valid = torch.ones_like(ids) if mask is None else torch.as_tensor(mask)
    if not ids.shape == types.shape == valid.shape or ids.is_floating_point():
        return
    types = types.clone()
    for row, given in enumerate(own):
        if given is None and not types[row].any():
            place = valid[row] != 0
            found = token_types(spec, ids[row][place].numpy())
            types[row, place] = torch.from_numpy(found).to(types.dtype)
    batch[_TYPES] = types


class RowSize(NamedTuple):
    """How much a row has for the model to do.

    Attributes:
        tokens: valid tokens: what a flattened row of it has.
        width: its tokens, padding of its own included: what a padded row of it has at least.
        patches: that the vision tower has to process: frames * height * width of all sizes.
        segments: images, frames of clips and crops, in which patches attend to each other.
        patch_pairs: the sum of their squared patches, which attention in the tower costs.
        longest: patches of the largest of them.
    """

    tokens: int
    width: int
    patches: int
    segments: int
    patch_pairs: int
    longest: int


def batch_of_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return one row of a dataset as a batch, without padding; pixels stay as they are.

    Raises:
        MRopeError: the row has no tokens, or a token column of several rows; a column that holds
            something else than numbers; as `read_sample`.
    """
    batch = read_sample(row)
    if "input_ids" not in batch:
        raise MRopeError("no input_ids: the column is missing or null")
    for name, value in batch.items():
        kind = COLUMNS[name].kind if name in COLUMNS else None
        if kind == "token":
            batch[name] = _one_row(name, as_numpy(name, value))
        elif kind == "item" or (kind == "patch" and name not in PIXELS):
            batch[name] = as_tensor(name, value)
        elif kind == "row":
            batch[name] = [value]
    return batch


def _one_row(name: str, column: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if column.ndim != 1:
        raise MRopeError(f"{name} must be (n,) or (1, n), not {(*column.shape,)}")
    return column[None]


def read_row(spec: MRopeSpec, row: Mapping[str, Any]) -> BatchInputs:
    """Read one row of a dataset as the collator reads it in a batch.

    Args:
        row: as a dataset holds it, or as `batch_of_row` returns it.

    Raises:
        MRopeError: as `batch_of_row` and `read_inputs`.
    """
    batch = batch_of_row(row)
    return read_inputs(spec, batch, Rows([batch], batch["input_ids"]), spec.family_row.packs)


def measure(inputs: BatchInputs) -> RowSize:
    """Count the tokens and patches of a row, or of all rows of a batch.

    Args:
        inputs: as `read_row` or `read_inputs` returns them.
    """
    size_N3 = np.concatenate([inputs.of(modality).size_N3 for modality in ("image", "video")])
    frame_N, height_N, width_N = size_N3.T
    area_N = height_N * width_N
    width = inputs.input_ids.size
    return RowSize(
        tokens=width if inputs.valid is None else int(np.count_nonzero(inputs.valid)),
        width=width,
        patches=int(frame_N @ area_N),
        segments=int(frame_N.sum()),
        patch_pairs=int(frame_N @ area_N**2),
        longest=int(area_N.max(initial=0)),
    )
