"""A padding collate function, for users who have none of their own: `inner_collate=None`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import pad

from mrope.collate.read import PIXELS, read_sample
from mrope.collate.values import as_tensor
from mrope.columns import COLUMNS, Columns, NewColumns, columns
from mrope.errors import MRopeError

Example = Columns

_TOKENS = tuple(columns("token"))
_JOINED = tuple(columns("item", "patch"))
_WHOLE = tuple(columns("batch"))
_OF_SIZES = ("size", "merge")
_SIZES_OF_CLIPS = tuple(columns("item", modality="video", means="size"))


class PaddingCollator:
    """Pad token columns into (B, S), concatenate pixels and grids; what `inner_collate=None` means.

    Args:
        pad_token_id: id that fills `input_ids`; `labels` are filled with -100, the rest with 0.
        padding_side: side on which a shorter row is filled.
        pad_to_multiple_of: S is rounded up to a multiple of this.
        join_pixels: concatenate pixels. False: they stay a list, which `MRopeCollator(shapes=...)`
            copies once, into their rung; otherwise they would be copied twice.

    Examples are mappings. Columns that hold nothing (None, NaN, `[]`, `[[]]`, tensors and arrays of
    size 0) are as if absent, see `mrope.collate.read.read_sample`.

    What a column is stands in `mrope.columns.COLUMNS`:

    - token columns, (n,) or (1, n), are padded. Where only some examples have an `attention_mask`,
      the others get ones; where only some have `mm_token_type_ids`, the others get zeros, in whose
      place `MRopeCollator` writes the types of their placeholders;
    - pixels, and what has an entry for each image, clip or audio, are concatenated on dim 0; an
      example without them adds nothing. Features of audios, and their masks, are padded in their
      last dimension first;
    - `use_audio_in_video` is one bool, or where clips differ one for each, (videos,);
      `downsample_mode` must be equal in all examples that have it, and
      become one value.

    Every other column stays a list with one entry per row.
    """

    def __init__(
        self,
        pad_token_id: int = 0,
        padding_side: Literal["left", "right"] = "right",
        pad_to_multiple_of: int = 1,
        join_pixels: bool = True,
    ) -> None:
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', not {padding_side!r}")
        if pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be at least 1, not {pad_to_multiple_of}")
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side
        self.pad_to_multiple_of = pad_to_multiple_of
        self.join_pixels = join_pixels

    def __call__(self, examples: Sequence[Example]) -> NewColumns:
        """Return the batch, a dict of torch tensors.

        Raises:
            MRopeError: no examples, an example that is no mapping or has no `input_ids`, a token
                column that only some examples have, that holds no integers, or whose length is not
                that of the row's `input_ids`; other columns that cannot be concatenated.
        """
        rows = [self._read(row, example) for row, example in enumerate(examples)]
        if not rows:
            raise MRopeError("cannot collate a batch without examples")
        batch: NewColumns = {}
        for name in _TOKENS:
            if any(name in row for row in rows):
                batch[name] = self._pad(name, rows)
        for name in _JOINED:
            parts = {
                row: value if isinstance(value, torch.Tensor) else _tensor(row, name, value)
                for row, sample in enumerate(rows)
                if (value := sample.get(name)) is not None
            }
            if parts and name in PIXELS and not self.join_pixels:
                batch[name] = list(parts.values())
            elif parts:
                batch[name] = _concatenated(name, parts)
        for name in _WHOLE:
            if any(name in row for row in rows):
                batch[name] = _one_value(name, rows)
        known = {*_TOKENS, *_JOINED, *_WHOLE}
        for name in dict.fromkeys(key for example in examples for key in example):
            if name not in known:
                batch[name] = [row.get(name) for row in rows]
        return batch

    def _read(self, row: int, example: Example) -> NewColumns:
        """Return one example with its token columns as 1-D tensors of one length."""
        if not isinstance(example, Mapping):
            raise MRopeError(f"row {row}: the example is no mapping, but {type(example).__name__}")
        try:
            sample = read_sample(example)
        except MRopeError as error:
            raise MRopeError(f"row {row}: {error}") from None
        if "input_ids" not in sample:
            raise MRopeError(f"row {row}: the example has no input_ids")
        for name in _TOKENS:
            if name not in sample:
                continue
            column = sample[name]
            if not isinstance(column, torch.Tensor):
                column = sample[name] = _tensor(row, name, column)
            if column.ndim != 1:
                raise MRopeError(
                    f"row {row}: {name} must be (n,) or (1, n), not {(*column.shape,)}"
                )
        length = len(sample["input_ids"])
        sample.setdefault("attention_mask", torch.ones(length, dtype=torch.int64))
        return sample

    def _pad(self, name: str, rows: Sequence[NewColumns]) -> torch.Tensor:
        # A row without tokens lacks nothing.
        missing = [
            index for index, row in enumerate(rows) if name not in row and len(row["input_ids"])
        ]
        # Made-up labels would change the loss; types follow from the tokens.
        if missing and name != "mm_token_type_ids":
            raise MRopeError(f"row {missing[0]}: no {name}, which other rows of the batch have")
        fill = self.pad_token_id if name == "input_ids" else COLUMNS[name].fill
        longest = max(len(row["input_ids"]) for row in rows)
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        out = torch.full((len(rows), width), fill, dtype=torch.int64)
        for target, row in zip(out, rows, strict=True):
            length = len(row["input_ids"])
            start = width - length if self.padding_side == "left" else 0
            target[start : start + length] = row.get(name, 0)
        return out


def _tensor(row: int, name: str, value: object) -> torch.Tensor:
    try:
        return as_tensor(name, value)
    except MRopeError as error:
        raise MRopeError(f"row {row}: {error}") from error


def _concatenated(name: str, parts: Mapping[int, torch.Tensor]) -> torch.Tensor:
    tensors = list(parts.values())
    try:
        if COLUMNS[name].modality == "audio" and tensors[0].ndim > 1:
            longest = max(part.shape[-1] for part in tensors)
            tensors = [pad(part, (0, longest - part.shape[-1])) for part in tensors]
        if COLUMNS[name].means in _OF_SIZES:
            # A product of sizes in the dtype of a small table would wrap around.
            tensors = [part.to(torch.int64) for part in tensors]
        return torch.cat(tensors)
    except (IndexError, RuntimeError) as error:
        shapes = {f"row {row}": tuple(part.shape) for row, part in parts.items()}
        raise MRopeError(f"{name} cannot be concatenated: {shapes}") from error


def _of_clips(name: str, rows: Sequence[Columns]) -> Any:
    """Return one bool where all clips have the same, else a bool for each of them."""
    (size,) = (one for one in _SIZES_OF_CLIPS if COLUMNS[one].sides == 3)
    for row, sample in enumerate(rows):
        if np.asarray(sample.get(name, False)).dtype != np.bool_:
            raise MRopeError(
                f"row {row}: {name} must be one bool for the whole batch, not {sample[name]!r}"
            )
    given = [np.ravel(np.asarray(sample[name])) for sample in rows if name in sample]
    if all(flags.all() == flags.any() == given[0].any() for flags in given):
        return bool(given[0].any())
    each: list[bool] = []
    for row, sample in enumerate(rows):
        flags, clips = np.ravel(np.asarray(sample.get(name, False))), len(sample.get(size, ()))
        if len(flags) not in (1, clips):
            raise MRopeError(
                f"row {row}: {name} has {len(flags)} values, but the row {clips} clips"
            )
        each += [bool(flag) for flag in (flags if len(flags) == clips else flags.repeat(clips))]
    return torch.tensor(each, dtype=torch.bool)


def _one_value(name: str, rows: Sequence[Columns]) -> Any:
    """Return the value of a column of which a batch has one, or one for each clip."""
    if COLUMNS[name].modality is not None:
        return _of_clips(name, rows)
    given = {row: _as_scalar(sample[name]) for row, sample in enumerate(rows) if name in sample}
    first, value = next(iter(given.items()))
    for row, other in given.items():
        if other != value:
            raise MRopeError(
                f"row {row}: {name} is {other!r}, but {value!r} in row {first}; a batch has one"
            )
    return value


def _as_scalar(value: object) -> Any:
    """Return a bool or a string, also out of an array or a list of one."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        value = value.tolist()
    return value[0] if isinstance(value, list) and len(value) == 1 else value
