"""Select the keys of GLM-5-Next's attention by pools, in padded rows and in a flattened one.

Its indexer scores pools of `index_kpool` keys, and lets each token attend to those that score
highest and to what is behind its last whole pool. Pools are counted from the first valid token of a
row. In a flattened row they are counted from the first of each example, so that none holds tokens
of two.

Shape suffixes: B rows, S tokens of a row, T tokens of a flattened row, P pools, R keys of a pool,
K pools that a token selects, H heads, D their dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from mrope.errors import MRopeError
from mrope.hf.methods import foreign_on_class

Sizes = Sequence[int]


class Pools(NamedTuple):
    """Pools of a flattened row; layers with an indexer get them in place of their mask.

    Attributes:
        ends: int64 (P,), the last token of each pool; T where the row has fewer pools.
        visible: bool (T, P), which tokens see all keys of a pool.
        tail: int64 (T, R - 1), what each token sees behind its last whole pool, itself included; -1
            where there is none. (T, 0) where a model does not select it.
        alike: tokens (N,) and pools (N, P') of examples that have equally many pools, and more than
            a token selects; on a CPU alone, and without fixed shapes.
    """

    ends: torch.Tensor
    visible: torch.Tensor
    tail: torch.Tensor
    alike: list[tuple[torch.Tensor, torch.Tensor]]


def find_pools(config: Any, borders: torch.Tensor, seq_idx: torch.Tensor, sizes: Sizes) -> Pools:
    """Return the pools of a flattened row, without a sync.

    Args:
        config: the text model's.
        borders: (examples + 1,), where examples begin and end.
        seq_idx: (1, T), the example of each token.
        sizes: tokens of each example; none with fixed shapes.
    """
    pool, example, borders = config.index_kpool, seq_idx[0].long(), borders.long()
    token, start = torch.arange(len(example), device=example.device), borders[example]
    most = len(token) // pool
    behind = (token - start + 1) % pool
    # One more slot takes what ends no pool: no mask selects, whose count would be a sync.
    ends = _gather_where(behind == 0, most, len(token))
    visible = (ends <= token[:, None]) & (ends >= start[:, None])
    offset = torch.arange(config.index_kpool_always_select_tail * (pool - 1), device=token.device)
    tail = ((token + 1 - behind)[:, None] + offset).masked_fill(offset >= behind[:, None], -1)
    alike = []
    if token.device.type == "cpu":
        counts = borders.diff() // pool
        first, count = (one[example] for one in (counts.cumsum(0) - counts, counts))
        for number, length in _count_long(sizes, pool, config.index_topk // pool):
            tokens = _gather_where(count == number, length, 0)
            alike.append((tokens, first[tokens, None] + torch.arange(number)))
    return Pools(ends, visible, tail, alike)


def _gather_where(mask: torch.Tensor, most: int, fill: int) -> torch.Tensor:
    """Return where a mask (T,) is true, (most,), filled up; a mask index would be a sync."""
    place = torch.arange(len(mask), device=mask.device)
    # One more slot takes what the mask leaves out.
    slot = torch.where(mask, mask.cumsum(0) - 1, most)
    return place.new_full((most + 1,), fill).scatter_(0, slot, place)[:most]


def _count_long(sizes: Sizes, pool: int, chosen: int) -> list[tuple[int, int]]:
    """Return numbers of pools above what a token selects, and the tokens of examples with so many.

    Pools tie, with a score of 0, where no head's product is positive. Which of them `topk` takes
    depends on a CPU on the number of scores that it is given; on a GPU it takes the first (ATen's
    TensorTopK.cu gathers them in order).
    """
    tokens: dict[int, int] = {}
    for size in sizes:
        if size // pool > chosen:
            tokens[size // pool] = tokens.get(size // pool, 0) + size
    return sorted(tokens.items())


def select_pools(
    self: Any,
    hidden_states: torch.Tensor,
    q_resid: torch.Tensor,
    attention_mask: torch.Tensor | Pools,
    **cache: object,
) -> torch.Tensor:
    """Return which keys each token attends to; replaces the indexer's forward.

    Args:
        hidden_states: (B, S, hidden); of a flattened row (1, T, hidden).
        q_resid: (B, S, rank), what queries are made of.
        attention_mask: (B, S), which goes to the indexer's own forward; or the pools of a flattened
            row.
        cache: as the indexer's own forward takes it.

    Returns:
        int32 (B, S, keys), places in the row, -1 where there is none.

    Raises:
        MRopeError: a flattened row, and a forward of another library on the class.
    """
    if not isinstance(attention_mask, Pools):
        own: torch.Tensor = type(self).forward(
            self, hidden_states, q_resid, attention_mask, **cache
        )
        return own
    foreign = foreign_on_class(type(self), "forward")
    if foreign is not None:
        raise MRopeError(
            f"packing='flatten' is not supported with {foreign}, not transformers' own: it would "
            "pool tokens of two examples; pad the batches"
        )
    pools = attention_mask
    # Indices have no gradient, in the indexer's own forward neither.
    with torch.no_grad():
        scores = _score_pools(self, hidden_states[0], q_resid[0], pools)
        chosen_TK = _choose(scores, pools, self.index_topk // self.index_kpool)
        keys_TKR = _tokens_of(pools.ends[chosen_TK], self.index_kpool)
        hidden = ~pools.visible.gather(1, chosen_TK)
        keys = keys_TKR.masked_fill(hidden[..., None], -1).flatten(1)
        return torch.cat((keys, pools.tail), 1)[None].int()


def _choose(scores_TP: torch.Tensor, pools: Pools, count: int) -> torch.Tensor:
    """Return the pools that each token selects, (T, K), as it would in a row of its example."""
    chosen = scores_TP.topk(min(count, scores_TP.shape[1]), dim=1).indices
    for tokens, own in pools.alike:
        best = scores_TP[tokens[:, None], own].topk(count, dim=1).indices
        chosen[tokens] = own.gather(1, best)
    return chosen


def _tokens_of(ends: torch.Tensor, pool: int) -> torch.Tensor:
    """Return the tokens of pools by their last ones, (..., R)."""
    return ends[..., None] + torch.arange(1 - pool, 1, device=ends.device)


def _score_pools(
    indexer: Any, states_TX: torch.Tensor, q_resid: torch.Tensor, pools: Pools
) -> torch.Tensor:
    """Return the score of each pool for each token, float32 (T, P), the least of unseen ones."""
    query_THD = indexer.wq_b(q_resid).unflatten(-1, (-1, indexer.head_dim))
    key_TD = indexer.k_norm(indexer.wk(states_TX))
    gate_TD = functional.linear(states_TX, indexer.index_kpool_compress_gate)
    token_PR = _tokens_of(pools.ends, indexer.index_kpool)
    filled_PR = token_PR < len(states_TX)
    token_PR = token_PR.clamp(max=len(states_TX) - 1)
    pooled_PD = _pool(indexer, key_TD[token_PR], gate_TD[token_PR], filled_PR)
    products = query_THD.float() @ pooled_PD.float().T
    products = products.mul_(indexer.softmax_scale).relu_()
    project = indexer.weights_proj
    weights = project(states_TX.to(project.weight.dtype)).float() * indexer.n_heads**-0.5
    scores: torch.Tensor = (weights[:, None] @ products)[:, 0]
    return scores.masked_fill_(~pools.visible, torch.finfo(scores.dtype).min)


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
