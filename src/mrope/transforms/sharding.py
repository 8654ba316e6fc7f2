"""Shard collated batches over the ranks of a sequence or context parallel group.

Position ids, borders and vision tensors depend on the whole sequence: computed on a rank's part
alone, they would start at 0. So the collator runs on the whole sequence in the worker, and
`shard_sequence` cuts the result.

Shape suffixes: S tokens of a whole row, L tokens of a rank's part, padding included, D segments of
a flattened row; a padded batch counts as one segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch

from mrope.arrays import IntArray, borders, starts
from mrope.collate.layouts import BATCH_FIRST
from mrope.collate.placement import Placement, token_columns
from mrope.columns import (
    COLUMNS,
    IGNORED_LABEL,
    MODALITIES,
    Columns,
    NewColumns,
    fill_of,
    tower_key,
)
from mrope.errors import MRopeError

Scheme = Literal["contiguous", "zigzag"]


class _Plan(NamedTuple):
    """Source and segment of each token of a rank's part.

    Attributes:
        source_L: index in the unpadded row; at padding that of the last token before it in its
            segment, or -1 if there is none.
        beyond_L: 0 at tokens; at padding the distance from that last token.
        segment_L: index of the segment in the padded row.
        borders_D: borders of the padded segments, (D + 1,).
    """

    source_L: IntArray
    beyond_L: IntArray
    segment_L: IntArray
    borders_D: IntArray


def shard_sequence(
    batch: Columns,
    rank: int,
    world_size: int,
    scheme: Scheme = "contiguous",
    *,
    pad_token_id: int = 0,
) -> NewColumns:
    """Cut a rank's part out of a batch of `MRopeCollator`, padded or flattened.

    - "contiguous": rank r takes the r-th of `world_size` equal parts. For attention over the whole
      sequence (Ulysses, or keys gathered from all ranks): `cu_seq_lens_*` and `max_length_*` stay
      those of the whole row.
    - "zigzag": the row is cut into 2 * `world_size` parts, and rank r takes part r and the r-th
      from the end, which balances causal attention (ring attention). In a flattened row each
      example is padded and cut separately; `cu_seq_lens_*` and `max_length_*` are those of the
      rank's part, the padded ones divided by `world_size`.

    Parts of batches of one shape (`MRopeCollator(shapes=...)`) have one shape too: `max_length_*`
    are then the length of the row or part, and in zigzag the last segment, which is padding, takes
    up what the padding of the examples leaves of the width.

    Args:
        batch: in model layout, with `input_ids` (B, S) and `position_ids` (3|4, B, S), or (B, S) of
            families with 1-D positions.
        rank, world_size: rank and size of the group that shares a sequence.
        scheme: see above.
        pad_token_id: token id at padding.

    Returns:
        A new dict. `position_ids` is cut on its last axis, every other tensor with one entry per
        token on axis 1; pixels, grids, vision tensors and `rope_deltas` stay whole. Padding has
        labels of -100 and a mask of 0. In a flattened row it is a segment of its own
        ("contiguous"), or the end of each example, where causal attention never reaches it
        ("zigzag"). Additional keys:

        - `shift_labels`, if there are `labels`: the label of the next token. Models shift `labels`
          themselves and would lose one at each cut; transformers' losses take these instead.
        - `image_scatter_index`: indices among the rank's B * L tokens; `image_feature_index`: the
          feature rows that go there. The same for `video_` and `audio_`. With fixed shapes
          `vision_feature_index` (B * L,) and `vision_feature_mask` (B, L): the feature row of each
          of the rank's tokens, and which of them take one. Other inputs of attached models are
          dropped, since these attend within one process: an attached model refuses the part.

    Raises:
        MRopeError: a rank outside the group, an unknown scheme, a batch without token ids or
            positions, or one in batch layout.

    Example:
        >>> ids = torch.arange(8)[None]
        >>> batch = {"input_ids": ids, "position_ids": ids.expand(3, 1, 8)}
        >>> shard_sequence(batch, 0, 2)["input_ids"].tolist()
        [[0, 1, 2, 3]]
        >>> shard_sequence(batch, 0, 2, "zigzag")["input_ids"].tolist()
        [[0, 1, 6, 7]]
    """
    _check(batch, rank, world_size, scheme)
    shape, flattened = np.shape(batch["input_ids"])[:2], "cu_seq_lens_q" in batch
    fixed = "vision_feature_index" in batch
    # An inner collate function may have left arrays or lists in a padded batch.
    whole = {**batch, **token_columns(batch, shape)}
    if whole.get("labels") is not None:
        # Before cutting: the last token of a part predicts the first token of the next.
        whole["shift_labels"] = _next_labels(whole["labels"])
    if not flattened and not fixed and whole.get("attention_mask") is None:
        # Parts get padding that the whole does not have, so a mask is needed now. Padding of fixed
        # shapes has no mask: it is on the right, where causal attention does not look.
        whole["attention_mask"] = torch.ones(shape, dtype=torch.int64)
    plan = _plan(whole, shape[1], rank, world_size, scheme)
    placement = _placement(plan, shape)
    part = {name: value for name, value in whole.items() if _is_of_a_part(name)}
    for name, column in token_columns(whole, shape).items():
        part[name] = placement.put(column.flatten(0, 1), fill_of(name, pad_token_id))
    part["position_ids"] = _cut_positions(whole["position_ids"], plan, flattened)
    if flattened:
        part |= _borders(plan, world_size if scheme == "zigzag" else 1, _is_fixed_row(whole))
    if fixed:
        # Padding repeats an index: its mask is False, so that it may be any.
        index = whole["vision_feature_index"].view(shape)
        source = torch.from_numpy(plan.source_L).clamp(min=0)
        part["vision_feature_index"] = index.index_select(1, source).flatten()
    for modality in MODALITIES:
        if tower_key(modality, "scatter_index") in whole:
            part |= _places(modality, whole, placement, shape)
    return part


def gather_sequence(
    parts: Sequence[Columns], scheme: Scheme = "contiguous"
) -> dict[str, torch.Tensor]:
    """Concatenate the parts of all ranks in the order of the whole sequence.

    Args:
        parts: results of `shard_sequence`, in the order of ranks.
        scheme: the scheme they were cut with.

    Returns:
        Token columns (B, S, ...) and `position_ids` (3|4, B, S) or (B, S) of the whole sequence; S
        includes the padding that made it divisible.
    """
    shape = tuple(parts[0]["input_ids"].shape[:2])
    names = token_columns(parts[0], shape)
    whole = {name: torch.cat([part[name] for part in parts], dim=1) for name in names}
    whole["position_ids"] = torch.cat([part["position_ids"] for part in parts], dim=-1)
    if scheme == "contiguous":
        return whole
    ranks = len(parts)
    borders = parts[0].get("cu_seq_lens_q", torch.tensor([0, shape[1]])).numpy().astype(np.int64)
    own = [_zigzag(borders * ranks, rank, ranks) for rank in range(ranks)]
    order = torch.from_numpy(np.concatenate(own).argsort())
    return {
        name: value.index_select(-1 if name == "position_ids" else 1, order)
        for name, value in whole.items()
    }


def _is_of_a_part(name: str) -> bool:
    """Whether a value of the batch says something of a part too, whole or cut."""
    return name not in COLUMNS or COLUMNS[name].of_part


def _check(batch: Columns, rank: int, world_size: int, scheme: str) -> None:
    if world_size < 1 or not 0 <= rank < world_size:
        raise MRopeError(f"rank {rank} is not one of world_size={world_size} ranks")
    if scheme not in get_args(Scheme):
        raise MRopeError(f"scheme must be 'contiguous' or 'zigzag', not {scheme!r}")
    lacking = [name for name in ("input_ids", "position_ids") if batch.get(name) is None]
    if lacking:
        raise MRopeError(
            f"cannot shard a batch without {lacking[0]}: positions depend on the whole "
            "sequence, so apply a MRopeCollator first"
        )
    if BATCH_FIRST in batch:
        raise MRopeError("shard_sequence takes model layout; call to_model_layout(batch) first")


def _next_labels(labels: torch.Tensor) -> torch.Tensor:
    """Return the label of each next token, (B, S); -100 at the end."""
    return torch.nn.functional.pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:]


def _plan(whole: Columns, width: int, rank: int, world_size: int, scheme: Scheme) -> _Plan:
    """Pad a row to a divisible length, and compute which tokens belong to the rank.

    Two ranks, zigzag, a flattened row of 3 and 4 tokens: each segment is padded to 4 tokens and cut
    into 4. Rank 0 takes the first and the last of each:

        padded row  source 0 1 2 2 3 4 5 6    beyond 0 0 0 1 0 0 0 0    borders 0 4 8
        rank 0      places 0 3 4 7            source 0 2 3 6            beyond 0 1 0 0
    """
    length_D = _lengths(whole, width)
    tail = -width % world_size
    if scheme == "contiguous" and tail and _without_tail(whole, len(length_D)):
        # An empty segment, which only padding fills, keeps examples free of padding.
        length_D = np.append(length_D, 0)
    if scheme == "zigzag":
        padded_D = _pad_each(whole, length_D, width, 2 * world_size)
    else:
        padded_D = length_D.copy()
        padded_D[-1] += tail
    borders_D = borders(padded_D)
    if scheme == "zigzag":
        place_L = _zigzag(borders_D, rank, world_size)
    else:
        place_L = np.arange(borders_D[-1]).reshape(world_size, -1)[rank]
    segment_L = np.arange(len(padded_D)).repeat(padded_D)[place_L]
    within_L = place_L - borders_D[segment_L]
    last_L = np.minimum(within_L, length_D[segment_L] - 1)
    source_L = starts(length_D)[segment_L] + last_L
    source_L[last_L < 0] = -1
    return _Plan(source_L, within_L - last_L, segment_L, borders_D)


def _lengths(whole: Columns, width: int) -> IntArray:
    """Return the tokens of each segment, (D,); a padded batch is one segment of its width."""
    borders = whole.get("cu_seq_lens_q")
    border_D = np.array([0, width]) if borders is None else borders.numpy().astype(np.int64)
    length_D: IntArray = np.diff(border_D)
    return length_D


def _is_fixed_row(whole: Columns) -> bool:
    """Whether a flattened row was padded to a rung: it has no list of lengths then."""
    return "cu_seq_lens_q" in whole and whole.get("segment_sizes") is None


def _without_tail(whole: Columns, segments: int) -> bool:
    """Return whether a flattened row ends with an example, not with a tail of padding.

    A tail is a segment without a rope delta; 1-D rows have none, and each may end with an example.
    The last segment of fixed shapes is always padding, or empty.
    """
    if "cu_seq_lens_q" not in whole or _is_fixed_row(whole):
        return False
    deltas = whole.get("rope_deltas")
    return deltas is None or segments == len(deltas)


def _pad_each(whole: Columns, length_D: IntArray, width: int, multiple: int) -> IntArray:
    """Round the length of each segment up to a multiple; with fixed shapes, to one total.

    Segments of 4, 4 and 2 tokens, the last one padding, and a multiple of 4 give 4 4 4. With fixed
    shapes they give 4 4 8: a batch with segments of 3, 5 and 2 tokens needs 4 8 4, 16 as well.
    """
    padded_D: IntArray = -(-length_D // multiple) * multiple
    if _is_fixed_row(whole):
        most = width + len(length_D) * (multiple - 1)
        padded_D[-1] = most // multiple * multiple - padded_D[:-1].sum()
    return padded_D


def _zigzag(borders_D: IntArray, rank: int, world_size: int) -> IntArray:
    """Compute a rank's token indices in a row whose segments are each cut into 2 * world_size."""
    chunk_D = np.diff(borders_D) // (2 * world_size)
    # Each segment gives two chunks: (D, 2) starts, with chunk_D tokens each.
    start_D2 = borders_D[:-1, None] + chunk_D[:, None] * [rank, 2 * world_size - 1 - rank]
    starts, lengths = start_D2.ravel(), chunk_D.repeat(2)
    ends = lengths.cumsum()
    place_L: IntArray = np.arange(lengths.sum()) + (starts - ends + lengths).repeat(lengths)
    return place_L


def _placement(plan: _Plan, shape: tuple[int, ...]) -> Placement:
    """Return where the tokens of the whole rows stand in the part's.

    Rows of 4 tokens, rank 1 of 2 holds tokens 2 and 3 of each: of the whole, 2 3 6 7, which stand
    at 0 1 2 3 in rows of 2.
    """
    rows, width = shape
    real_K = (plan.beyond_L == 0).nonzero()[0]
    row_B1 = np.arange(rows)[:, None]
    kept, place = row_B1 * width + plan.source_L[real_K], row_B1 * len(plan.source_L) + real_K
    return Placement(rows, len(plan.source_L), place.ravel(), kept.ravel())


def _cut_positions(position_ids: torch.Tensor, plan: _Plan, flattened: bool) -> torch.Tensor:
    """Select positions (3|4, B, L) or (B, L); padding has 0, or in a flattened row counts on."""
    source_L, beyond_L = torch.from_numpy(plan.source_L), torch.from_numpy(plan.beyond_L)
    part = position_ids.index_select(-1, source_L.clamp(min=0))
    if not flattened:
        part[..., beyond_L > 0] = 0
        return part
    # A tail has no token before it: -1 plus a distance of at least 1 starts it at 0.
    part[..., source_L < 0] = -1
    return part + beyond_L


def _borders(plan: _Plan, ranks: int, fixed: bool) -> NewColumns:
    """Compute the borders of a part's segments, divided by `ranks`, and `seq_idx` (1, L).

    Args:
        fixed: the longest segment may not differ from batch to batch: it is the whole length.
    """
    borders_D = plan.borders_D // ranks
    borders = torch.from_numpy(borders_D.astype(np.int32))
    longest = int(borders_D[-1] if fixed else np.diff(borders_D).max())
    return {
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders.clone(),
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": torch.from_numpy(plan.segment_L.astype(np.int32))[None],
    }


def _places(
    modality: str, whole: Columns, placement: Placement, shape: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """Select the feature rows of the rank's tokens, and compute their indices among these tokens.

    Rows of 4 tokens, rank 1 of 2, features at the flat indices 1 2 6 7: the rank holds 2, 6 and 7,
    which are features 1 2 3; among its own rows of 2 tokens these are at 0 2 3.
    """
    scatter = whole[tower_key(modality, "scatter_index")].numpy()
    # Feature rows are in the order of tokens.
    feature_T = np.full(shape[0] * shape[1], -1)
    feature_T[scatter] = np.arange(len(scatter))
    kept_K = feature_T[placement.kept_K]
    rows = torch.from_numpy(kept_K[kept_K >= 0])
    kept = whole.get(tower_key(modality, "feature_index"))  # VideoLLaMA 3, which leaves some out
    return {
        tower_key(modality, "scatter_index"): torch.from_numpy(placement.places(feature_T >= 0)),
        tower_key(modality, "feature_index"): rows if kept is None else kept[rows],
    }
