"""Qwen4-Exp's indexer for all tokens at once selects the keys that transformers' loop selects."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

qwen4 = pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp")

from mrope.guard import SyncGuard
from mrope.hf.indexer import select_tokens

HIDDEN, HEAD, ROTARY = 32, 16, 8


def indexer(budget: int = 8, ratio: int = 4) -> Any:
    """An indexer with enough heads that no two blocks have the same score."""
    config = SimpleNamespace(
        hidden_size=HIDDEN,
        rms_norm_eps=1e-6,
        indexer_n_heads=8,
        indexer_kv_heads=1,
        indexer_head_dim=HEAD,
        indexer_budget=budget,
        indexer_compress_ratio=ratio,
    )
    made = qwen4.Qwen4ExpTextQSAIndexer(config, 0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def mask(kind: str, rows: int, length: int) -> torch.Tensor:
    """Which keys each token may attend to, bool (rows, 1, length, length)."""
    causal = torch.ones(length, length, dtype=torch.bool).tril().repeat(rows, 1, 1)
    border = torch.randint(0, length, (rows,))[:, None]
    place = torch.arange(length)
    if kind == "left":
        causal &= (place >= border)[:, None]
    elif kind == "right":
        causal &= (place <= border)[:, None]
    elif kind == "flattened":
        example = torch.randint(0, 2, (rows, length)).cumsum(-1) // 3
        causal &= example[:, :, None] == example[:, None]
    return causal[:, None]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["full", "left", "right", "flattened"])
def test_the_same_keys_without_a_sync(kind: str, dtype: torch.dtype) -> None:
    for seed in range(8):
        torch.manual_seed(seed)
        length = int(torch.randint(2, 40, ()))
        states, angles = torch.randn(3, length, HIDDEN), torch.randn(3, length, ROTARY // 2)
        rotary = [one.repeat(1, 1, 2) for one in (angles.cos(), angles.sin())]
        visible = mask(kind, 3, length)
        if dtype != torch.bool:
            visible = torch.where(visible, 0.0, torch.finfo(dtype).min)
        own = indexer()
        wanted = own(states, rotary, visible, None)
        with SyncGuard() as guard:
            selected = select_tokens(own, states, (rotary[0], rotary[1]), visible)
        assert torch.equal(selected, wanted), seed
        assert guard.count == 0, guard.report()


def test_a_budget_leaves_keys_out() -> None:
    """What the test above would see if blocks were not scored: 8 of 36 keys are kept, and a tail."""
    states, rotary = torch.randn(1, 36, HIDDEN), (torch.ones(1, 36, ROTARY), torch.zeros(1, 36, 8))
    selected = select_tokens(indexer(), states, rotary, mask("full", 1, 36))
    assert selected[0, 0].sum(-1).tolist()[-5:] == [8, 9, 10, 11, 8]
