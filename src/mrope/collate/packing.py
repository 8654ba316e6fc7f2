"""Padding-free batches: all examples of a batch in one row, with their borders and no padding.

Attention must not look over a border, and how a model learns of borders depends on its attention:
transformers' masks are cut where the text row of `position_ids` restarts (if there is no 2-D mask
and no cache), flash attention and linear attention read `cu_seq_lens_q`, the convolution in front
of linear attention reads `seq_idx`. A flattened batch carries all of them.

Shape suffixes: B rows and S width of the padded batch, T tokens of the one row, D examples.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mrope.arrays import IntArray
from mrope.collate.padding import PaddingCollator
from mrope.errors import MRopeError
from mrope.positions.located import Located
from mrope.spec.references import (
    borders_reach_the_tower,
    describe_known,
    installed_transformers,
    prove_if_unknown,
)
from mrope.spec.spec import MRopeSpec

_IGNORED = -100
# Their first two dimensions are (B, S) by accident, if they are.
_NEVER_TOKENS = (
    "pixel_values",
    "image_",
    "video_",
    "second_per_grid",
    "input_features",
    "feature_attention_mask",
    "audio_",
)


@dataclass(frozen=True)
class Flatten:
    """Options of padding-free batches: `MRopeCollator(packing=Flatten(...))`.

    Plain data: it pickles, and `packing="flatten"` is short for `Flatten()`.

    Args:
        pad_to_multiple_of: the row is filled up to a multiple of this, by a segment of its own.
        pad_token_id: token id of that segment.

    Raises:
        ValueError: `pad_to_multiple_of` is below 1.
    """

    pad_to_multiple_of: int = 1
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if self.pad_to_multiple_of < 1:
            raise ValueError(
                f"pad_to_multiple_of must be at least 1, not {self.pad_to_multiple_of}"
            )


def check_packing(spec: MRopeSpec, options: Flatten) -> None:
    """Refuse a model whose examples would attend to each other in one row.

    Raises:
        MRopeError: the family's modelling code was not compared, or the installed release of
            transformers lets examples attend to each other.
        ValueError: the token id of padding is a placeholder.
    """
    refuse_placeholder(spec, options.pad_token_id)
    if not spec.family_row.packs:
        raise MRopeError(
            f"packing='flatten' is refused for {spec.family}: nobody has compared what its "
            "examples see of each other in one row"
        )
    version = installed_transformers() or spec.reference.removeprefix("transformers-")
    if borders_reach_the_tower(version):
        raise MRopeError(
            f"packing='flatten' is refused with transformers {version}: flash attention in its "
            "vision tower would take the borders of the text; install "
            f"{describe_known('flatten')}, or pad"
        )
    prove_if_unknown("flatten", spec)


def refuse_placeholder(spec: MRopeSpec, pad_token_id: int) -> None:
    """Refuse padding that would be taken for a token of an image or video.

    Raises:
        ValueError: the token id is a placeholder.
    """
    if pad_token_id in (spec.image_token_id, spec.video_token_id):
        raise ValueError(f"pad_token_id {pad_token_id} is a placeholder of images or videos")


def seq_lengths(
    batch: Mapping[str, Any], examples: Any, shape: tuple[int, int], mask: Any
) -> list[list[int]]:
    """Return for each row of a padded batch the lengths of the examples that it holds.

    A row is one example, unless it was packed before: then `seq_lengths`, in the batch or in the
    examples, holds the tokens of each (as TRL's packing writes it), or the attention mask numbers
    them 1, 2, 3 ...

    Raises:
        MRopeError: some of the rows have `seq_lengths`, and others not.
    """
    rows, width = shape
    own = _own_lengths(batch, examples, rows)
    if own is not None:
        return own
    if mask is None:
        return [[width]] * rows if width else [[]] * rows
    return [_run_lengths(row) for row in np.asarray(mask)]


def refuse_packed(batch: Mapping[str, Any], examples: Any, shape: tuple[int, int]) -> None:
    """Refuse rows that say that they hold several examples, where they are not kept apart."""
    own = _own_lengths(batch, examples, shape[0])
    for row, lengths in enumerate(own or ()):
        if len(lengths) > 1:
            raise MRopeError(
                f"row {row} holds {len(lengths)} examples (seq_lengths), which would be numbered "
                "and attended to as one; packing='flatten' keeps them apart"
            )


def flatten(
    batch: MutableMapping[str, Any],
    located: Located,
    position_ids: npt.NDArray[Any],
    options: Flatten,
    width: int | None = None,
) -> dict[str, Any]:
    """Bring the token columns of a padded batch into one row, in place, and return the borders.

    Columns are `input_ids` and whatever else has the first two dimensions (B, S); pixels, grids and
    vision tensors stay as they are, since rows keep their order. The attention mask goes.

    Args:
        located: the batch, with `seq_lengths` in its inputs.
        position_ids: (3, B, S) int64, or float32.
        width: tokens of the row, tail included; None: the next multiple that `options` asks for.

    Returns:
        - `position_ids` (4, 1, T), of the dtype given: the text row, which restarts at every
          example, then time, height and width.
        - `cu_seq_lens_q`, `cu_seq_lens_k` int32 (D + 1,), `max_length_q`, `max_length_k` ints,
          `seq_idx` int32 (1, T): the borders, from lengths. Two arrays, since a model may write to
          one.
        - `segment_sizes`: the same as a list of ints, for attached models (`mrope.hf.attach`).
        - `use_cache` False: with a cache transformers masks as if there were no borders.

    Example: rows of 3 and 2 tokens, a multiple of 4

        cu_seq_lens [0, 3, 5, 8]    text row [0 1 2 0 1 0 1 2]    seq_idx [0 0 0 1 1 2 2 2]

        The tail of 3 is a segment of its own, so that no example sees it; it has no border inside.

    Raises:
        MRopeError: no valid token at all.
    """
    shape = located.inputs.shape
    length_D, borders_D = located.stream.length_D, located.stream.border_D1
    if not length_D.size:
        raise MRopeError("cannot flatten a batch without a valid token")
    valid_BS = located.stream.valid_BS
    index_T = None if valid_BS is None else np.flatnonzero(valid_BS)
    tokens = int(length_D.sum())
    tail = -tokens % options.pad_to_multiple_of if width is None else width - tokens
    batch.pop("attention_mask", None)
    batch.pop("seq_lengths", None)
    for name in [name for name, value in batch.items() if is_column(name, value, shape)]:
        fill = fill_of(name, options.pad_token_id)
        batch[name] = _one_row(torch.as_tensor(batch[name]), index_T, tail, fill)
    if batch.get("labels") is not None:
        # The model shifts labels by one: this is the target of the last token of the one before.
        batch["labels"][:, borders_D[:-1]] = _IGNORED

    if tail:
        length_D = np.append(length_D, tail)
        borders_D = np.append(borders_D, borders_D[-1] + tail)
    longest = int(length_D.max())
    return {
        "position_ids": _positions(position_ids, index_T, borders_D, length_D, tail),
        "cu_seq_lens_q": borders_D.astype(np.int32),
        "cu_seq_lens_k": borders_D.astype(np.int32),
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": np.arange(len(length_D), dtype=np.int32).repeat(length_D)[None],
        "segment_sizes": length_D.tolist(),
        "use_cache": False,
    }


def _own_lengths(batch: Mapping[str, Any], examples: Any, rows: int) -> list[list[int]] | None:
    """Return `seq_lengths` as the batch or its examples have it; None where none has."""
    given: Any = batch.get("seq_lengths")
    if given is None and isinstance(examples, Sequence) and len(examples) == rows:
        given = [one.get("seq_lengths") if isinstance(one, Mapping) else None for one in examples]
    if given is None or all(lengths is None for lengths in given):
        return None
    lacking = [row for row, lengths in enumerate(given) if lengths is None]
    if lacking:
        raise MRopeError(f"row {lacking[0]}: no seq_lengths, which other rows of the batch have")
    return [np.asarray(lengths).ravel().tolist() for lengths in given]


def _run_lengths(mask_S: npt.NDArray[Any]) -> list[int]:
    """Return the lengths of the runs of equal values among a row's valid tokens."""
    numbers = mask_S[mask_S != 0]
    borders = (numbers[1:] != numbers[:-1]).nonzero()[0] + 1
    return np.diff(borders, prepend=0, append=len(numbers)).tolist() if len(numbers) else []


def is_column(name: str, value: Any, shape: tuple[int, ...]) -> bool:
    """Whether a value of the batch has an entry for each token."""
    if name.startswith(_NEVER_TOKENS) or value is None:
        return False
    if name not in PaddingCollator.token_columns:
        return isinstance(value, (torch.Tensor, np.ndarray)) and value.shape[:2] == shape
    found = tuple(np.shape(value))
    if found[:2] != shape:
        raise MRopeError(f"{name} has shape {found}, but input_ids {shape}")
    return True


def fill_of(name: str, pad_token_id: int) -> int:
    """Return what a token column holds at padding."""
    return {"input_ids": pad_token_id, "labels": _IGNORED}.get(name, 0)


def _one_row(
    column: torch.Tensor, index_T: npt.NDArray[np.int64] | None, tail: int, fill: int
) -> torch.Tensor:
    """Return the valid tokens of (B, S, ...) and `tail` of `fill`: (1, T, ...), always a copy."""
    tokens = column.flatten(0, 1)
    if index_T is not None:
        tokens = tokens.index_select(0, torch.from_numpy(index_T))
    return torch.cat((tokens, tokens.new_full((tail, *tokens.shape[1:]), fill)))[None]


def _positions(
    position_ids: npt.NDArray[Any],
    index_T: npt.NDArray[np.int64] | None,
    borders_D: IntArray,
    length_D: IntArray,
    tail: int,
) -> npt.NDArray[Any]:
    """Return (4, 1, T): how far each token is from its border, then (3, B, S) in one row."""
    # Qwen3-Omni's are float32, which holds the text row exactly up to 2 ** 24 tokens.
    rows_4T = np.empty((4, borders_D[-1]), position_ids.dtype)
    rows_4T[0] = np.arange(borders_D[-1])
    rows_4T[0] -= borders_D[:-1].repeat(length_D)
    tokens = borders_D[-1] - tail
    flat_3N = position_ids.reshape(3, -1)
    rows_4T[1:, :tokens] = flat_3N if index_T is None else flat_3N.take(index_T, axis=1)
    rows_4T[1:, tokens:] = np.arange(tail)
    return rows_4T[:, None]
