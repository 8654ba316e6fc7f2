"""Read samples, and the inputs of position ids out of a batch and its examples.

Every reader goes through here: the collator, `Precheck`, `mrope check` and the sampler of `mrope
train` agree on what a row is. `single_row` reads one row of a dataset, `values` a single value.

Shape suffixes: B rows of the batch, N images, clips or audios.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mrope.arrays import Array, as_array
from mrope.collate.segments import refuse_packed, seq_lengths
from mrope.collate.values import (
    axes_of,
    check_numbers,
    joined_images,
    read_value,
)
from mrope.columns import (
    COLUMNS,
    MODALITIES,
    Batch,
    Columns,
    NewColumns,
    columns,
    count_key,
)
from mrope.errors import MRopeError
from mrope.positions.inputs import (
    SECONDS,
    length_error,
    reads_types,
    refuse_half_precision,
)
from mrope.positions.spans import token_types
from mrope.spec.families import find_family
from mrope.spec.spec import MRopeSpec

_READ = {
    name: column
    for name, column in COLUMNS.items()
    if column.kind != "derived" and column.means != "count"
}
_TOKENS = tuple(columns("token"))
# The dtype of these is looked at: nulls among integers, seconds that are too coarse.
_CHECKED = frozenset(
    name for name, column in _READ.items() if column.integers or column.means == "seconds"
)
# Dense ones of these on the CPU need no look.
_INTEGERS = frozenset((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))
PIXELS = {
    name: tuple(columns("item", modality=COLUMNS[name].modality, means="size"))
    for name in columns("patch")
    if COLUMNS[name].means is None
}
"""Columns of pixels, each with those of its sizes."""

_TYPES = "mm_token_type_ids"
_SECONDS = tuple(columns("item", means="seconds"))
_MASKS = {str(COLUMNS[name].modality): name for name in columns("item", means="mask")}
_SIZES = {one: tuple(columns("item", modality=one, means="size")) for one in MODALITIES}
_COUNTS = {one: count_key(one) for one in MODALITIES}
# Columns of sizes, each with the column of counts, and the mask whose sums it may be.
_COUNTED = {
    name: (_COUNTS[modality], _MASKS.get(modality))
    for modality, names in _SIZES.items()
    for name in names
}


def read_sample(example: Columns) -> NewColumns:
    """Return a sample without its absent columns, and the others in one form.

    Absent is what holds no number: None, NaN and other nulls, and tensors, arrays and nested lists
    that are empty or hold nothing but nulls. Only `input_ids` may be empty: a row without a token.

    Returns:
        Token columns (n,); items with all their axes, also where the sample has a single one
        without its axis: grids (N, 3), crops (N, 2), seconds and audio lengths (N,); pixels as one
        tensor or array, also where each image has its own. Tensors stay tensors and numeric lists
        stay lists, so that dtypes are chosen where they are used. Columns of the user are returned
        as they are.

    Raises:
        MRopeError: grids with a batch axis, seconds at half precision, or a token column of another
            length than `input_ids`.

    Example:
        >>> read_sample({"input_ids": [[7, 8]], "image_grid_thw": [1, 4, 4], "labels": []})
        {'input_ids': [7, 8], 'image_grid_thw': [[1, 4, 4]]}
    """
    read = {
        name: read_column(name, value) if name in _READ else value
        for name, value in example.items()
    }
    sample = {name: value for name, value in read.items() if value is not None or name not in _READ}
    ids = sample.get("input_ids")
    if ids is not None:
        for name in _TOKENS:
            column = sample.get(name, ids)
            if len(column) != len(ids) and axes_of(ids) == axes_of(column) == 1:
                # As of a batch of one, so that the text is that of `rope_index`.
                raise length_error(name, (1, len(column)), (1, len(ids)))
    for name, sizes in PIXELS.items():
        if name in sample and getattr(sample[name], "ndim", 0) not in (2, 4):
            sample[name] = joined_images(sample, name, sizes)
    return sample


def read_column(name: str, value: object) -> Any:
    """Return one column as `read_sample` does, or None where it is absent.

    Of a column of the user only nulls are.
    """
    column = _READ.get(name)
    if (
        column is not None
        and isinstance(value, torch.Tensor)
        and value.ndim == column.axes
        and value.numel()
        and (
            name not in _CHECKED
            or (value.dtype in _INTEGERS and value.is_cpu and value.layout == torch.strided)
        )
    ):
        return value  # as processors give it, and the torch format of `datasets`
    return read_value(name, column, value)


class Rows:
    """The examples of a batch, if they are its rows: each column of theirs is read once.

    An inner collate function that makes, drops or merges samples gives other rows: then the
    examples say nothing about them.

    Args:
        examples: what the inner collate function was given.
        input_ids: of the batch that it made.
    """

    def __init__(self, examples: Any, input_ids: Any) -> None:
        if isinstance(input_ids, (list, tuple)):
            rows = len(input_ids)
        else:
            # What has no axis is refused later.
            rows = (*getattr(input_ids, "shape", ()), None)[0]
        are_rows = (
            (type(examples) is list or isinstance(examples, Sequence))
            and len(examples) == rows
            and all(type(one) is dict or isinstance(one, Mapping) for one in examples)
        )
        self.examples: Sequence[Columns] | None = examples if are_rows else None
        self._read: dict[str, list[Any] | None] = {}

    def of(self, name: str) -> list[Any] | None:
        """Return a column's value in each row, None where it is absent; None if it is in no row."""
        if name in self._read:
            return self._read[name]
        values: list[Any] = []
        found = None
        try:
            for example in self.examples or ():
                values.append(read_column(name, example.get(name)))
                found = found if values[-1] is None else values
        except MRopeError as error:
            raise MRopeError(f"row {len(values)}: {error}") from None
        self._read[name] = found
        return found


def as_batch(batch: object) -> Batch:
    """Return what an inner collate function made, if it is a mapping with `input_ids`.

    Raises:
        MRopeError: it is not.
    """
    if (type(batch) is dict or isinstance(batch, MutableMapping)) and "input_ids" in batch:
        return batch
    keys = f" with {sorted(map(str, batch))}" if isinstance(batch, Mapping) else ""
    raise MRopeError(
        "the inner collate function must return a mapping with input_ids, "
        f"not {type(batch).__name__}{keys}"
    )


def read_arguments(
    spec: MRopeSpec, batch: Batch, rows: Rows, apart: bool
) -> tuple[NewColumns, npt.DTypeLike]:
    """Return the arguments of `rope_index` in a batch, as `check_inputs` takes them.

    Args:
        batch: what the inner collate function returned; tensors on the CPU, arrays or lists. Types
            and seconds that only some rows have are completed in it, as each of the others would
            have them alone.
        rows: of what that function was given, to learn what belongs to each row.
        apart: whether rows may hold several examples, which are numbered apart.

    Returns:
        Arrays by the names of their columns, and the dtype in which seconds are multiplied.

    Raises:
        MRopeError: an input on a device or at half precision; ids of a wrong shape. Others are not
            checked yet.
    """
    ids = as_numpy("input_ids", batch["input_ids"])
    # Checked before anything that is read beside the ids, whose errors would be harder to place.
    if ids.ndim != 2:
        raise MRopeError(f"input_ids must have shape (B, S), not {ids.shape}")
    if isinstance(batch.get(_TYPES), torch.Tensor) and reads_types(spec):
        _complete_types(spec, batch, rows)
    given: NewColumns = {"input_ids": ids}
    for name in _names_read(spec.family):
        value = batch.get(name)
        if value is not None:
            said = COLUMNS[name].kind == "batch" and isinstance(value, (bool, str))
            given[name] = value if said else as_numpy(name, value)
    for modality, mask in _MASKS.items():
        if mask in given:
            check_numbers(mask, given[mask])
            given[_SIZES[modality][0]] = _sums(given.pop(mask))
    _add_counts(spec, given, rows)
    names = [name for name in _SECONDS if batch.get(name) is not None]
    wide = bool(names) and _read_seconds(spec, names, given, batch, rows)
    if apart:
        lengths = seq_lengths(batch, rows.examples, ids.shape, given.get("attention_mask"))
        if lengths is not None:
            given["seq_lengths"] = lengths
    elif "seq_lengths" in batch or any("seq_lengths" in one for one in rows.examples or ()):
        refuse_packed(batch, rows.examples, ids.shape)
    return given, np.float64 if wide else np.float32


@lru_cache(maxsize=64)
def _names_read(family: str) -> tuple[str, ...]:
    """Return the columns that a family's position ids are computed from, beside the ids."""
    row = find_family(family)
    assert row is not None  # the spec has it
    names = {"attention_mask", _TYPES, *row.inputs}
    names.update(name for of in _SIZES.values() for name in of if COLUMNS[name].sides == 3)
    names.update(_COUNTS[modality] for modality in ("image", "video"))
    if _SIZES["audio"][0] in names:
        names.update(_MASKS.values())
    return tuple(sorted(names - {*_SECONDS}))


def as_numpy(name: str, value: Any) -> Array:
    """Return a value of the batch as an array, without a copy of a tensor.

    Raises:
        MRopeError: a tensor on a device or at half precision, or a ragged list.
    """
    if not isinstance(value, torch.Tensor):
        return as_array(name, value, "numbers")
    if not value.is_cpu or value.layout != torch.strided:
        raise MRopeError(f"{name} is on {value.device}: collate functions must return CPU tensors")
    if value.is_floating_point():
        refuse_half_precision(name, value)
    return (value.detach() if value.requires_grad else value).numpy()


def _add_counts(spec: MRopeSpec, given: NewColumns, rows: Rows) -> None:
    """Add how many images, clips and audios each row has, if those of the batch are theirs.

    Otherwise sizes are checked over the whole batch.
    """
    for name, (key, mask) in _COUNTED.items():
        if name not in given or key in given:
            continue
        if mask is not None and key not in spec.family_row.inputs:
            continue
        masks = None if mask is None else rows.of(mask)
        own = rows.of(name) if masks is None else [_sums(one) for one in masks]
        if own is None:
            continue
        sizes = given[name]
        try:
            parts = [sizes[:0] if one is None else as_numpy(name, one) for one in own]
            together = np.concatenate(parts)
        except (TypeError, ValueError, RuntimeError, IndexError):
            continue
        if together.shape == sizes.shape and not np.count_nonzero(together != sizes):
            given[key] = np.array([len(part) for part in parts])


def _sums(mask: object) -> Array | None:
    return None if mask is None else np.atleast_1d(np.asarray(mask).sum(axis=-1))


def _read_seconds(
    spec: MRopeSpec,
    names: Sequence[str],
    given: NewColumns,
    batch: Batch,
    rows: Rows,
) -> bool:
    """Read the seconds of clips, by either name; return whether they are multiplied in float64."""
    row, clips_B = spec.family_row, given.get(_COUNTS["video"])
    if (
        (row.timed or SECONDS in row.inputs)
        and clips_B is not None
        and np.shape(clips_B) == given["input_ids"].shape[:1]
        and all(isinstance(batch[name], torch.Tensor) for name in names)
    ):
        _complete_seconds(names, batch, rows, np.asarray(clips_B).tolist(), row.timed)
    values = [as_numpy(name, batch[name]) for name in names]
    if len(values) == 2 and not np.array_equal(values[0], values[1]):
        raise MRopeError(f"{names[0]} and {names[1]} are both present and differ")
    given[SECONDS] = values[0]
    # torch multiplies a float64 tensor in float64; a list of Python floats becomes float32 first.
    value = batch[names[0]]
    return isinstance(value, torch.Tensor) and value.dtype == torch.float64


def _complete_seconds(
    names: Sequence[str], batch: Batch, rows: Rows, clips_B: Sequence[int], ones: bool
) -> None:
    """Write the seconds of all clips under each name that the batch has, if they are the rows'.

    Args:
        ones: give clips of rows without seconds 1.0, which the reference takes for a batch without
            any.

    Raises:
        MRopeError: a row has the seconds of another row's clips, or others by each name.
    """
    of_names = [_seconds_of_rows(name, batch[name], rows) for name in names]
    if not all(of_names):
        return
    parts: list[torch.Tensor] = []
    misfits: list[str] = []
    for row, clips in enumerate(clips_B):
        own = {name: of[row] for name, of in zip(names, of_names, strict=True) if row in of}
        if clips and not own and not ones:
            raise MRopeError(f"row {row}: no {names[0]}, which other rows of the batch have")
        if len(own) > 1 and not torch.equal(*own.values()):
            raise MRopeError(f"row {row}: {names[0]} and {names[1]} are both present and differ")
        parts.append(next(iter(own.values())) if own else batch[names[0]].new_ones(clips))
        if len(parts[-1]) != clips:
            size = f"{next(iter(own))} has {len(parts[-1])} values"
            misfits.append(f"row {row}: {size}, but the row {clips} clips")
    lengths, needed = [len(batch[name]) for name in names], sum(clips_B)
    # Others are refused later, once it is known whether clips and tokens fit.
    if misfits and needed in (*lengths, sum(map(len, parts))):
        raise MRopeError(misfits[0])
    if not misfits and lengths != [needed] * len(names):
        batch.update(dict.fromkeys(names, torch.cat(parts)))


def _seconds_of_rows(name: str, given: torch.Tensor, rows: Rows) -> dict[int, torch.Tensor]:
    """Return the seconds of each row that has some; {} if the inner function made others."""
    counts = {row: len(one) for row, one in enumerate(rows.of(name) or ()) if one is not None}
    if given.ndim != 1 or sum(counts.values()) != len(given):
        return {}
    return dict(zip(counts, torch.split(given, [*counts.values()]), strict=True))


def _complete_types(spec: MRopeSpec, batch: Batch, rows: Rows) -> None:
    """Give rows that came without types those of their placeholder tokens.

    `mm_token_type_ids` that the inner collate function filled with zeros, in families whose types
    follow from the tokens.
    """
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
