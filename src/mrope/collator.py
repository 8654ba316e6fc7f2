"""The stage that a user plugs into a DataLoader: `MRopeCollator`, and a padding collate for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from mrope.errors import MRopeError
from mrope.families import MRopeSpec
from mrope.positions import rope_index

Example = Mapping[str, Any]
Collate = Callable[[Any], Any]

_OUTPUTS = ("position_ids", "rope_deltas")
_OPTIONAL = ("attention_mask", "image_grid_thw", "video_grid_thw", "mm_token_type_ids")
# transformers' processors and models do not agree on the name of the same numbers.
_SECONDS = ("second_per_grid_ts", "video_second_per_grid")
_PER_SAMPLE = {"image_grid_thw": "images_per_sample", "video_grid_thw": "videos_per_sample"}


class MRopeCollator:
    """Add `position_ids` and `rope_deltas` to the batch that another collate function makes.

    The collator runs wherever the DataLoader runs it, holds plain data only, pickles, and needs no
    model and no transformers. What it adds is equal to what the model would compute for itself, in
    the release that the spec names, so that the model's forward only reads it.

    Args:
        inner_collate: any collate function that returns a mutable mapping with `input_ids` (B, S):
            a dict, `BatchEncoding` or `BatchFeature`. None: `PaddingCollator()`.
        spec: the model's numbers and the reference to follow.

    Example:
        >>> from mrope.families import example_config
        >>> collate = MRopeCollator(None, MRopeSpec.from_config(
        ...     example_config("qwen3_vl"), "transformers-5.23"))
        >>> batch = collate([{"input_ids": [7, 8, 9]}, {"input_ids": [7]}])
        >>> tuple(batch["position_ids"].shape), batch["rope_deltas"].tolist()
        ((3, 2, 3), [[0], [0]])
    """

    def __init__(self, inner_collate: Collate | None, spec: MRopeSpec) -> None:
        if not isinstance(spec, MRopeSpec):
            raise TypeError(f"spec must be an MRopeSpec, not {type(spec).__name__}")
        if inner_collate is not None and not callable(inner_collate):
            raise TypeError(f"inner_collate must be callable, not {type(inner_collate).__name__}")
        self.inner_collate = PaddingCollator() if inner_collate is None else inner_collate
        self.spec = spec

    def __call__(self, examples: Any) -> Any:
        """Collate `examples` and attach the positions of the batch.

        Args:
            examples: what the inner collate function takes. Where it is a sequence of mappings that
                carry their own `image_grid_thw` and `video_grid_thw`, each row is checked on its own.

        Returns:
            The inner function's batch, with `position_ids` int64 (3, B, S) and `rope_deltas` int64
            (B, 1) added as torch tensors and no other key changed.

        Raises:
            SpanMismatchError: placeholder tokens and grids do not fit together.
            MRopeError: the batch is not a mapping, has no `input_ids`, already has positions, or
                holds something else that `rope_index` refuses.
        """
        batch = _as_batch(self.inner_collate(examples))
        position_ids, rope_deltas = rope_index(self.spec, **_arguments(batch, examples))
        batch["position_ids"] = torch.from_numpy(position_ids)
        batch["rope_deltas"] = torch.from_numpy(rope_deltas)
        return batch

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner_collate!r}, {self.spec!r})"


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
    flat_columns = ("pixel_values", "pixel_values_videos", *_PER_SAMPLE, *_SECONDS)

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
                raise MRopeError(f"row {row}: {name} must be (n,) or (1, n), not {(*column.shape,)}")
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


def _as_batch(batch: Any) -> MutableMapping[str, Any]:
    if not isinstance(batch, MutableMapping) or "input_ids" not in batch:
        raise MRopeError(
            "the inner collate function must return a mapping with input_ids, "
            f"not {type(batch).__name__}{_keys(batch)}"
        )
    for name in _OUTPUTS:
        if batch.get(name) is not None:
            raise MRopeError(
                f"the inner collate function already gave {name}; two sources of positions in one "
                "batch are a mistake: remove one"
            )
    return batch


def _keys(batch: Any) -> str:
    return f" with {sorted(map(str, batch))}" if isinstance(batch, Mapping) else ""


def _arguments(batch: Mapping[str, Any], examples: Any) -> dict[str, Any]:
    """Return the arguments of `rope_index` that the batch and its examples hold."""
    arguments = {"input_ids": _array("input_ids", batch["input_ids"])}
    for name in _OPTIONAL:
        if batch.get(name) is not None:
            arguments[name] = _array(name, batch[name])
    arguments |= _seconds(batch)
    for grid, counts in _PER_SAMPLE.items():
        if batch.get(counts) is not None:
            arguments[counts] = _array(counts, batch[counts])
        elif grid in arguments:
            arguments[counts] = _count(examples, grid, arguments)
    return arguments


def _array(name: str, value: Any) -> npt.NDArray[Any]:
    if not isinstance(value, torch.Tensor):
        return np.asarray(value) if isinstance(value, np.ndarray) else _array_of(name, value)
    if value.device.type != "cpu":
        raise MRopeError(f"{name} is on {value.device}: collate functions must return CPU tensors")
    if value.dtype == torch.bfloat16:
        raise MRopeError(f"{name} is bfloat16, too coarse to number tokens by; keep it float32")
    return value.detach().numpy()


def _array_of(name: str, value: Any) -> npt.NDArray[Any]:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise MRopeError(f"{name} is ragged: {error}") from error


def _seconds(batch: Mapping[str, Any]) -> dict[str, Any]:
    given = [name for name in _SECONDS if batch.get(name) is not None]
    if not given:
        return {}
    values = [_array(name, batch[name]) for name in given]
    if len(values) == 2 and not np.array_equal(values[0], values[1]):
        raise MRopeError(f"{given[0]} and {given[1]} are both in the batch and differ")
    value = batch[given[0]]
    wide = isinstance(value, torch.Tensor) and value.dtype == torch.float64
    return {"second_per_grid_ts": values[0]} | ({"seconds_dtype": np.float64} if wide else {})


def _count(
    examples: Any, grid: str, arguments: Mapping[str, Any]
) -> npt.NDArray[np.int64] | None:
    """Return how many grids each example carries, if the batch's grids are theirs in that order.

    An inner function that makes, drops, merges or reorders samples gives other grids or rows; then
    the examples say nothing about rows, and the check over the whole batch stands.
    """
    if not isinstance(examples, Sequence) or len(examples) != len(arguments["input_ids"]):
        return None
    if not all(isinstance(example, Mapping) for example in examples):
        return None
    own = [example.get(grid) for example in examples]
    if all(value is None for value in own):
        return None
    try:
        grids = [_own_grid(value) for value in own]
    except (TypeError, ValueError, RuntimeError):
        return None
    if not np.array_equal(np.concatenate(grids), arguments[grid]):
        return None
    return np.array([len(value) for value in grids])


def _own_grid(value: Any) -> npt.NDArray[Any]:
    """Return one example's grids as (n, 3); an example may hold a single (3,) grid, or none."""
    return np.empty((0, 3), np.int64) if value is None else np.asarray(value).reshape(-1, 3)
