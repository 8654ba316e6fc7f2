"""Fill in what only some examples of a batch have, as each of the others would have it alone.

Datasets that were interleaved have a column in some rows and not in others. A row without
`mm_token_type_ids` or seconds is good by itself, and must not turn bad beside a row with them.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch

from mrope.collate.samples import SECONDS, read_column
from mrope.positions.inputs import reads_types
from mrope.positions.spans import token_types
from mrope.spec.spec import MRopeSpec

_TYPES = "mm_token_type_ids"


def complete(spec: MRopeSpec, batch: MutableMapping[str, Any], examples: Any) -> None:
    """Replace types and seconds of the batch where some of its examples came without theirs.

    Nothing happens where the examples are not the batch's rows, or all have the columns.

    - `mm_token_type_ids`: rows that the inner collate function filled with zeros get the types of
      their placeholder tokens, in families whose types follow from the tokens.
    - `second_per_grid_ts` or `video_second_per_grid`: videos without seconds get 1.0, which is what
      the reference takes for a batch without any, in families with timed videos.
    """
    if not are_rows(examples, batch["input_ids"]):
        return
    if isinstance(batch.get(_TYPES), torch.Tensor) and reads_types(spec):
        _complete_types(spec, batch, examples)
    if spec.family_row.timed:
        for name in SECONDS:
            if isinstance(batch.get(name), torch.Tensor):
                _complete_seconds(name, batch, examples)


def are_rows(examples: Any, input_ids: Any) -> bool:
    """Whether the examples are mappings, as many as the batch has rows."""
    return (
        isinstance(examples, Sequence)
        and len(examples) == len(input_ids)
        and all(isinstance(example, Mapping) for example in examples)
    )


def _complete_types(
    spec: MRopeSpec, batch: MutableMapping[str, Any], examples: Sequence[Mapping[str, Any]]
) -> None:
    lacking = [
        row
        for row, example in enumerate(examples)
        if read_column(_TYPES, example.get(_TYPES)) is None
    ]
    ids, types = (torch.as_tensor(batch[name]) for name in ("input_ids", _TYPES))
    # All lack it: the inner function made the types, and they are checked as they are.
    if not lacking or len(lacking) == len(examples) or ids.shape != types.shape:
        return
    mask = batch.get("attention_mask")
    valid = torch.ones_like(ids) if mask is None else torch.as_tensor(mask)
    if valid.shape != ids.shape or ids.is_floating_point():
        return
    types = types.clone()
    for row in lacking:
        if not types[row].any():
            place = valid[row] != 0
            found = token_types(spec, ids[row][place].numpy())
            types[row, place] = torch.from_numpy(found).to(types.dtype)
    batch[_TYPES] = types


def _complete_seconds(
    name: str, batch: MutableMapping[str, Any], examples: Sequence[Mapping[str, Any]]
) -> None:
    given = batch[name]
    parts, found = [], 0
    for example in examples:
        grids = read_column("video_grid_thw", example.get("video_grid_thw"))
        own = read_column(name, example.get(name))
        videos = 0 if grids is None else len(grids)
        count = 0 if own is None else len(own)
        parts.append(given[found : found + count] if count else given.new_ones(videos))
        found += count
    # Otherwise the inner function made or dropped seconds of its own.
    if given.ndim == 1 and found == len(given):
        batch[name] = torch.cat(parts)
