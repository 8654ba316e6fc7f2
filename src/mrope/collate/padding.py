"""A padding collate function, for users who have none of their own: `inner_collate=None`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from mrope.errors import MRopeError

Example = Mapping[str, Any]


class PaddingCollator:
    """Pad token columns into (B, S), concatenate pixels and grids; what `inner_collate=None` means.

    Args:
        pad_token_id: id that fills `input_ids`; `labels` are filled with -100, the rest with 0.
        padding_side: side on which a shorter row is filled.
        pad_to_multiple_of: S is rounded up to a multiple of this.

    Examples are mappings. `input_ids`, `attention_mask`, `labels`, `mm_token_type_ids` and
    `token_type_ids`, (n,) or (1, n), are padded; an `attention_mask` is made where there is none.
    `pixel_values`, `pixel_values_videos`, the grids and the seconds are concatenated on dim 0; an
    example without them adds nothing. Every other column stays a list with one entry per row.
    """

    token_columns = ("input_ids", "attention_mask", "labels", "mm_token_type_ids", "token_type_ids")
    flat_columns = (
        "pixel_values",
        "pixel_values_videos",
        "image_grid_thw",
        "video_grid_thw",
        "second_per_grid_ts",
        "video_second_per_grid",
    )

    def __init__(
        self,
        pad_token_id: int = 0,
        padding_side: Literal["left", "right"] = "right",
        pad_to_multiple_of: int = 1,
    ) -> None:
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', not {padding_side!r}")
        if pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be at least 1, not {pad_to_multiple_of}")
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return the batch, a dict of torch tensors.

        Raises:
            MRopeError: no examples, an example that is no mapping or has no `input_ids`, a token
                column that only some examples have, that holds no integers, or whose length is not
                that of the row's `input_ids`; other columns that cannot be concatenated.
        """
        rows = [self._token_rows(row, example) for row, example in enumerate(examples)]
        if not rows:
            raise MRopeError("cannot collate a batch without examples")
        batch: dict[str, Any] = {}
        for name in self.token_columns:
            if any(name in row for row in rows):
                batch[name] = self._pad(name, rows)
        for name in self.flat_columns:
            parts = {
                row: _tensor(row, name, example[name])
                for row, example in enumerate(examples)
                if _has(example, name)
            }
            if parts:
                batch[name] = _concatenated(name, parts)
        known = {*self.token_columns, *self.flat_columns}
        for name in dict.fromkeys(key for example in examples for key in example):
            if name not in known:
                batch[name] = [example.get(name) for example in examples]
        return batch

    def _token_rows(self, row: int, example: Example) -> dict[str, torch.Tensor]:
        """Return the token columns of one example as 1-D tensors of one length."""
        if not isinstance(example, Mapping):
            raise MRopeError(f"row {row}: the example is no mapping, but {type(example).__name__}")
        if not _has(example, "input_ids"):
            raise MRopeError(f"row {row}: the example has no input_ids")
        columns = {
            name: _integers(row, name, example[name])
            for name in self.token_columns
            if _has(example, name)
        }
        for name, column in columns.items():
            if column.ndim == 2 and column.shape[0] == 1:
                columns[name] = column[0]
            elif column.ndim != 1:
                raise MRopeError(
                    f"row {row}: {name} must be (n,) or (1, n), not {(*column.shape,)}"
                )
        length = len(columns["input_ids"])
        for name, column in columns.items():
            if len(column) != length:
                raise MRopeError(f"row {row}: {len(column)} {name}, but {length} input_ids")
        columns.setdefault("attention_mask", torch.ones(length, dtype=torch.int64))
        return columns

    def _pad(self, name: str, rows: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
        missing = [index for index, row in enumerate(rows) if name not in row]
        if missing:
            raise MRopeError(f"row {missing[0]}: no {name}, which other rows of the batch have")
        fill = {"input_ids": self.pad_token_id, "labels": -100}.get(name, 0)
        longest = max(len(row[name]) for row in rows)
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        out = torch.full((len(rows), width), fill, dtype=torch.int64)
        for target, row in zip(out, rows, strict=True):
            length = len(row[name])
            start = width - length if self.padding_side == "left" else 0
            target[start : start + length] = row[name]
        return out


def _has(example: Example, name: str) -> bool:
    return example.get(name) is not None


def _tensor(row: int, name: str, value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MRopeError(f"row {row}: {name} cannot become a tensor: {error}") from error


def _integers(row: int, name: str, value: Any) -> torch.Tensor:
    column = _tensor(row, name, value)
    # An empty list becomes float32.
    if column.numel() and (column.is_floating_point() or column.is_complex()):
        raise MRopeError(f"row {row}: {name} must hold integers, not {column.dtype}")
    return column


def _concatenated(name: str, parts: Mapping[int, torch.Tensor]) -> torch.Tensor:
    try:
        return torch.cat(list(parts.values()))
    except RuntimeError as error:
        shapes = {f"row {row}": tuple(part.shape) for row, part in parts.items()}
        raise MRopeError(f"{name} cannot be concatenated: {shapes}") from error
