"""Pool the keys of GLM-5-Next's attention, for its indexer to select from.

Shape suffixes: B rows, S tokens of a row, P pools, R keys of a pool, D the dimension of a head.
"""

from __future__ import annotations

from typing import Any

import torch


def _pool(
    indexer: Any, keys: torch.Tensor, gates: torch.Tensor, filled: torch.Tensor
) -> torch.Tensor:
    """Return the mean of the keys of each pool, (..., D), weighted by their gates.

    Args:
        keys, gates: (..., R, D).
        filled: bool (..., R), which keys there are.
    """
    scores = gates.float() + indexer.index_kpool_compress_ape.float()
    weights = scores.masked_fill(~filled[..., None], float("-inf")).softmax(dim=-2).nan_to_num()
    pooled: torch.Tensor = (weights.to(keys.dtype) * keys).sum(dim=-2)
    return pooled


def pool_states(
    self: Any, packed_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pool the keys of an indexer of GLM-5-Next; replaces its `get_pooled_states`.

    transformers' own leaves out the pools that no row fills, by a mask: three syncs a layer. Here
    those are left out that no row of this width can fill: the same, if one row has no padding. Of
    any others none is selected, but scores that tie may be ranked in another order.

    Args:
        packed_states: (B, S, 2 * head_dim + 1): keys, scores of the gate, and whether a token is
            valid.

    Returns:
        Keys of the pools (B, P, head_dim); places of their tokens, int64 (B, P, index_kpool), -1
        where there is none; which pools are full, bool (B, P).
    """
    keys, gates, valid = torch.split(packed_states, [self.head_dim, self.head_dim, 1], dim=-1)
    valid = valid.squeeze(-1).bool()
    rows, width = valid.shape
    device = valid.device
    # Pools begin at the first valid token: padding on the left does not shift them.
    first = torch.where(valid.any(-1), valid.long().argmax(-1), width)
    pools = width // self.index_kpool
    offset = torch.arange(pools * self.index_kpool, device=device)
    place = first[:, None, None] + offset.view(1, pools, self.index_kpool)
    row, inside = torch.arange(rows, device=device)[:, None, None], place.clamp(max=width - 1)
    filled = valid[row, inside] & (place < width)
    pooled = _pool(self, keys[row, inside], gates[row, inside], filled)
    return pooled, place.masked_fill(~filled, -1), filled.all(-1)
