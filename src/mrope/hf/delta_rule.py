"""Compute the gated delta rule of Qwen3.5 and its kin in torch, where no kernels are installed.

The chunked form of transformers' reference (Gated Delta Networks, arXiv 2412.06464), whose values
it returns. That one takes slices in a loop over the chunks, and the backward of each fills and adds
a tensor as large as the row: its time grows with the square of the chunks. Before release 5.17 a
second loop runs over the tokens of a chunk. Here only the states come one after another.

Shape suffixes: B rows, S tokens, H heads, D of a head; N chunks, G rows times heads, C tokens of a
chunk.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from mrope.collate.linear_columns import CHUNK

_EPSILON = 1e-6


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
) -> torch.Tensor:
    """Return the rule's output (B, S, heads, d), in the dtype of the value.

    Args:
        query, key: (B, S, key heads, d); normalized here. A key head serves as many heads in a row
            as there are for each.
        value: (B, S, heads, d).
        decay: (B, S, heads), its log; not above 0.
        beta: (B, S, heads).
    """
    tokens, heads = value.shape[1:3]
    # Under autocast products would be of half precision, in which no triangle can be solved.
    with torch.autocast(query.device.type, enabled=False):
        query, key = (
            _normalize(one.float()).repeat_interleave(heads // one.shape[2], dim=2)
            for one in (query, key)
        )
        scaled = query * query.shape[-1] ** -0.5
        out_NGCD = _run(
            _in_chunks(scaled),
            _in_chunks(key),
            _in_chunks(value.float()),
            _in_chunks(decay.float()[..., None]).cumsum(2),
            _in_chunks(beta.float()[..., None]),
        )
    by_row = out_NGCD.reshape(-1, len(query), heads, *out_NGCD.shape[2:])
    return by_row.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :tokens].to(value.dtype)


def _normalize(values: torch.Tensor) -> torch.Tensor:
    return values * torch.rsqrt((values * values).sum(-1, keepdim=True) + _EPSILON)


def _in_chunks(values_BSHD: torch.Tensor) -> torch.Tensor:
    """Return (N, G, C, D), contiguous, with zeros behind the last token."""
    rows, tokens, *rest = values_BSHD.shape
    padded = functional.pad(values_BSHD, (0, 0, 0, 0, 0, -tokens % CHUNK))
    by_chunk = padded.reshape(rows, -1, CHUNK, *rest)
    return by_chunk.permute(1, 0, 3, 2, 4).flatten(1, 2).contiguous()


def _run(
    query_NGCD: torch.Tensor,
    key_NGCD: torch.Tensor,
    value_NGCD: torch.Tensor,
    decay_NGC1: torch.Tensor,
    beta_NGC1: torch.Tensor,
) -> torch.Tensor:
    """Run the rule on chunks; decay is added up from each chunk's first token on."""
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=key_NGCD.device).triu(1)
    # Masked in the log: the exponential of what is above the diagonal could overflow.
    between = (decay_NGC1 - decay_NGC1.mT).masked_fill(later, float("-inf")).exp()
    weighted = key_NGCD * beta_NGC1
    system = (weighted @ key_NGCD.mT) * between
    so_far = decay_NGC1.exp()
    sides = torch.cat((value_NGCD * beta_NGC1, weighted * so_far), -1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    new, read = solved.split((value_NGCD.shape[-1], key_NGCD.shape[-1]), -1)
    last = decay_NGC1[:, :, -1:]
    written, from_state = _scan(
        new, read, query_NGCD * so_far, key_NGCD * (last - decay_NGC1).exp(), last.exp()
    )
    within = (query_NGCD @ key_NGCD.mT) * between
    return within @ written + from_state


def _scan(
    new: torch.Tensor,
    read: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    kept: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Carry the state (G, D, D) from chunk to chunk.

    Returns:
        What each chunk writes, and what its queries find in the state before it; (N, G, C, D).
    """
    state = new.new_zeros(new.shape[1], key.shape[-1], new.shape[-1])
    written, found = [], []
    # Unbound at once: the backward of an index into a chunk would fill a tensor for all of them.
    for new_GCD, read_GCD, query_GCD, key_GCD, kept_G11 in zip(
        *(one.unbind() for one in (new, read, query, key, kept)), strict=True
    ):
        written.append(new_GCD - read_GCD @ state)
        found.append(query_GCD @ state)
        state = torch.baddbmm(state * kept_G11, key_GCD.mT, written[-1])
    return torch.stack(written), torch.stack(found)
