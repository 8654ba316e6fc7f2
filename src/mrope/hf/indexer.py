"""Select the keys of Qwen4-Exp's attention for all tokens at once.

Qwen4-Exp lets each token attend to the blocks of keys that its indexer scores highest. The indexer
of transformers 5.24 loops over the tokens of a batch in Python and reads the number of visible keys
back for each: B * S syncs a layer. Here they are tensors.

A block is `compress_ratio` keys of one example, in order. A token sees a prefix of its example's
keys, so that the blocks of a row are the same for all its tokens, and which of them a token sees is
read off the mask at the last key of each.

Shape suffixes: B rows, S tokens of a row, K blocks of a row, R keys of a block, H heads, D their
dimension.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from mrope.hf.attention import modelling_of


class Blocks(NamedTuple):
    """Blocks of keys, in the order of their places; some rows have fewer than K.

    Attributes:
        of_key: int64 (B, S), the block of each key; any block where the key is in none.
        has_block: bool (B, S), whether a key is in a whole block.
        visible: bool (B, S, K), which tokens see all keys of a block.
        places: int64 (B, K, R), the keys of each block.
    """

    of_key: torch.Tensor
    has_block: torch.Tensor
    visible: torch.Tensor
    places: torch.Tensor


def select_tokens(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor,
    cache: Any = None,
) -> torch.Tensor:
    """Return which keys each token attends to; replaces the indexer's forward.

    Args:
        hidden_states: (B, S, hidden).
        position_embeddings: cosine and sine, (B, S, rotary dimension) each.
        attention_mask: (B, 1, S, S), bool, or 0 where a key is visible. A mask with more keys than
            tokens, as in decoding from a cache, goes to the indexer's own forward.
        cache: takes the keys, if any.

    Returns:
        bool (B, 1, S, S). Equal to the indexer's own but where two blocks have the same score, of
        which `topk` takes either.
    """
    rows, length, _ = hidden_states.shape
    if attention_mask.shape[-1] != length:
        own: torch.Tensor = type(self).forward(
            self, hidden_states, position_embeddings, attention_mask, cache
        )
        return own
    # Indices have no gradient, in the indexer's own forward neither.
    with torch.no_grad():
        query_BSHD, key_BSD = _project(self, hidden_states, position_embeddings)
        if cache is not None:
            key_BSD = cache.update_indexer(key_BSD, self.layer_idx)
        seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
        seen_BSS = seen[:, 0].expand(rows, -1, -1)
        if length < self.compress_ratio:
            return seen_BSS[:, None]
        blocks = _find_blocks(seen_BSS, self.compress_ratio)
        scores_BSK = _score(self, query_BSHD, key_BSD, blocks.places, position_embeddings)
        scores_BSK.masked_fill_(~blocks.visible, -math.inf)
        chosen = scores_BSK.topk(min(self.block_topk, scores_BSK.shape[-1]), dim=-1).indices
        dropped_BSK = blocks.visible.scatter(-1, chosen, False)
        of_key = blocks.of_key[:, None].expand(-1, length, -1)
        dropped_BSS = dropped_BSK.gather(-1, of_key) & blocks.has_block[:, None]
        return (seen_BSS & ~dropped_BSS)[:, None]


def _project(
    indexer: Any, hidden_states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotated queries, (B, S, H, D), and the keys as they are, (B, S, D)."""
    heads, dim = indexer.index_n_heads, indexer.index_head_dim
    both = indexer.index_qk_proj(hidden_states)
    query, key = both.split([heads * dim, indexer.index_kv_heads * dim], dim=-1)
    query = indexer.q_layernorm(query.reshape(*query.shape[:-1], heads, dim))
    cos, sin = rotary
    rotate = modelling_of(indexer).apply_rotary_pos_emb
    return rotate(query, cos=cos, sin=sin, unsqueeze_dim=2), key


def _find_blocks(seen_BSS: torch.Tensor, ratio: int) -> Blocks:
    """Cut the keys of each example into blocks of `ratio`; what is left over is in none."""
    rows, length, _ = seen_BSS.shape
    most = length // ratio
    place_BS = torch.arange(length, device=seen_BSS.device).expand(rows, -1)
    # A token that sees n keys is the nth of its example; padding sees none, itself included.
    count_BS = seen_BSS.sum(-1)
    valid_BS = seen_BSS.diagonal(dim1=1, dim2=2)
    ends_BS = valid_BS & (count_BS % ratio == 0)
    ordinal_BS = ends_BS.cumsum(-1) - ends_BS.long()
    # One more column takes what is to be dropped: no mask selects, whose count would be a sync.
    end_BK = _scatter(torch.where(ends_BS, ordinal_BS, most), place_BS, most)
    of_key = ordinal_BS.clamp(max=most - 1)
    # A key left over has the number of the next example's block, whose last token does not see it.
    own_end = end_BK.gather(1, of_key)[:, None]
    exists_BK = place_BS[:, :most] < ends_BS.sum(-1, keepdim=True)
    has_block = valid_BS & seen_BSS.gather(1, own_end)[:, 0] & exists_BK.gather(1, of_key)
    slot_BS = torch.where(has_block, of_key * ratio + (count_BS - 1) % ratio, most * ratio)
    places = _scatter(slot_BS, place_BS, most * ratio).reshape(rows, most, ratio)
    visible = seen_BSS.gather(2, end_BK[:, None].expand(-1, length, -1)) & exists_BK[:, None]
    return Blocks(of_key, has_block, visible, places)


def _scatter(index: torch.Tensor, values: torch.Tensor, length: int) -> torch.Tensor:
    """Write values at indices of rows of `length`, 0 elsewhere; an index of `length` is dropped."""
    wide = values.new_zeros((len(values), length + 1))
    return wide.scatter_(1, index, values)[:, :length]


def _score(
    indexer: Any,
    query_BSHD: torch.Tensor,
    key_BSD: torch.Tensor,
    places_BKR: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Return the score of each block for each token, float32 (B, S, K)."""
    keys_BKRD = _rows(key_BSD, places_BKR.flatten(1)).reshape(*places_BKR.shape, -1)
    # The mean in float32, then in the keys' dtype, as the indexer's own forward rounds.
    pooled = indexer.k_layernorm(keys_BKRD.float().mean(dim=2).to(key_BSD.dtype))
    cos, sin = (_rows(one, places_BKR[..., 0]) for one in rotary)
    rotate = modelling_of(indexer).apply_rotary_pos_emb
    pooled = rotate(pooled[:, :, None], cos=cos, sin=sin, unsqueeze_dim=2)[:, :, 0]
    products = query_BSHD.float().flatten(1, 2) @ pooled.float().transpose(1, 2)
    scores: torch.Tensor = products.reshape(*query_BSHD.shape[:3], -1).relu().sum(dim=2)
    return scores / math.sqrt(indexer.index_head_dim)


def _rows(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the rows (B, N, D) at index (B, N) of values (B or 1, S, D)."""
    values = values.expand(len(index), -1, -1)
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
