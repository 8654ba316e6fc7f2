"""Compute the gated delta rule of Qwen3.5 and its kin in torch, where no kernels are installed.

The chunked form of transformers' reference (Gated Delta Networks, arXiv 2412.06464), whose values
it returns. That one takes slices in a loop over the chunks, and the backward of each fills and adds
a tensor as large as the row: its time grows with the square of the chunks. Before release 5.17 a
second loop runs over the tokens of a chunk. Here only the states come one after another.

Shape suffixes: B rows, S tokens, H heads, D of a head; N chunks, G rows times heads, C tokens of a
chunk.
"""

from __future__ import annotations

from typing import Any

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
    hidden = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=key_NGCD.device).triu(1)
    # Masked in the log: the exponential of what is above the diagonal could overflow.
    between = (decay_NGC1 - decay_NGC1.mT).masked_fill(hidden, float("-inf")).exp()
    weighted = key_NGCD * beta_NGC1
    system = (weighted @ key_NGCD.mT) * between
    so_far = decay_NGC1.exp()
    sides = torch.cat((value_NGCD * beta_NGC1, weighted * so_far), -1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    new, read = solved.split((value_NGCD.shape[-1], key_NGCD.shape[-1]), -1)
    last = decay_NGC1[:, :, -1:]
    written, states = chunk_states(
        new.contiguous(), read.contiguous(), key_NGCD * (last - decay_NGC1).exp(), last.exp()
    )
    within = (query_NGCD @ key_NGCD.mT) * between
    result: torch.Tensor = within @ written + (query_NGCD * so_far) @ states
    return result


@torch.library.custom_op("mrope::chunk_states", mutates_args=())
def chunk_states(
    new: torch.Tensor, read: torch.Tensor, key: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Carry the state from chunk to chunk, each of which takes what it reads from what is new.

    An operator, so that a graph has one node for all chunks, and the backward few calls for each.

    Args:
        new: (N, G, C, D), float32, as all.
        read: (N, G, C, d), keys that read the state before a chunk.
        key: (N, G, C, d), keys that write the state behind it.
        kept: (N, G, 1, 1), the share of the state that a chunk keeps.

    Returns:
        - written (N, G, C, D): new - read @ state.
        - states (N, G, d, D), before each chunk: 0, then kept * state + key.mT @ written.
    """
    written = new.clone()
    states = new.new_zeros(*new.shape[:2], key.shape[-1], new.shape[-1])
    for chunk in range(len(new)):
        if chunk:
            torch.mul(states[chunk - 1], kept[chunk - 1], out=states[chunk])
            states[chunk].baddbmm_(key[chunk - 1].mT, written[chunk - 1])
        written[chunk].baddbmm_(read[chunk], states[chunk], alpha=-1)
    return written, states


@chunk_states.register_fake
def _(
    new: torch.Tensor, _read: object, key: torch.Tensor, _kept: object
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(new), new.new_empty(*new.shape[:2], key.shape[-1], new.shape[-1])


@torch.library.custom_op("mrope::chunk_states_backward", mutates_args=())
def chunk_states_backward(
    of_written: torch.Tensor,
    of_states: torch.Tensor,
    read: torch.Tensor,
    key: torch.Tensor,
    kept: torch.Tensor,
    written: torch.Tensor,
    states: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of new, read, key and kept, given those of written and states."""
    total = of_written.clone(memory_format=torch.contiguous_format)
    later = torch.zeros_like(states)  # gradients of the states behind each chunk
    for chunk in reversed(range(len(total))):
        total[chunk].baddbmm_(key[chunk], later[chunk])
        if chunk:
            torch.addcmul(of_states[chunk], later[chunk], kept[chunk], out=later[chunk - 1])
            later[chunk - 1].baddbmm_(read[chunk].mT, total[chunk], alpha=-1)
    of_kept = (states * later).sum((-2, -1), keepdim=True)
    return total, (total @ states.mT).neg_(), written @ later.mT, of_kept


@chunk_states_backward.register_fake
def _(
    of_written: torch.Tensor,
    _: object,
    read: torch.Tensor,
    key: torch.Tensor,
    kept: torch.Tensor,
    *_saved: object,
) -> tuple[torch.Tensor, ...]:
    shapes = (of_written, read, key, kept)
    return tuple(one.new_empty(one.shape) for one in shapes)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[1:], *output)


def _backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
    result: tuple[torch.Tensor, ...] = chunk_states_backward(*gradients, *ctx.saved_tensors)
    return result


chunk_states.register_autograd(_backward, setup_context=_save)
