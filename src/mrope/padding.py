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
            MRopeError: no examples, an example without `input_ids`, or a token column that only
                some examples have or whose length is not that of the row's `input_ids`.
        """
        rows = [self._token_rows(row, example) for row, example in enumerate(examples)]
        if not rows:
            raise MRopeError("cannot collate a batch without examples")
        batch: dict[str, Any] = {}
        for name in self.token_columns:
            if any(name in row for row in rows):
                batch[name] = self._pad(name, rows)
        for name in self.flat_columns:
            parts = [_tensor(example[name]) for example in examples if _has(example, name)]
            if parts:
                batch[name] = torch.cat(parts)
        known = {*self.token_columns, *self.flat_columns}
        for name in dict.fromkeys(key for example in examples for key in example):
            if name not in known:
                batch[name] = [example.get(name) for example in examples]
        return batch

    def _token_rows(self, row: int, example: Example) -> dict[str, torch.Tensor]:
        """Return the token columns of one example as 1-D tensors of one length."""
        if not _has(example, "input_ids"):
            raise MRopeError(f"row {row}: the example has no input_ids")
        columns = {
            name: _tensor(example[name]) for name in self.token_columns if _has(example, name)
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


def _tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.as_tensor(value)
