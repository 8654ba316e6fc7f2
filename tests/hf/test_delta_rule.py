"""The gated delta rule in torch, against transformers' reference and against a loop over tokens."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from mrope.hf.delta_rule import chunk_states, gated_delta_rule

reference = inspect.unwrap(torch_chunk_gated_delta_rule)


def parts_of(
    rows: int, tokens: int, key_heads: int, heads: int, keys: int, values: int
) -> list[torch.Tensor]:
    drawn = torch.Generator().manual_seed(tokens)
    shapes = [(key_heads, keys), (key_heads, keys), (heads, values)]
    parts = [torch.randn(rows, tokens, *shape, generator=drawn) for shape in shapes]
    parts.append(-3 * torch.rand(rows, tokens, heads, generator=drawn))
    parts.append(torch.rand(rows, tokens, heads, generator=drawn))
    return parts


def run_reference(query: Any, key: Any, value: Any, decay: Any, beta: Any) -> torch.Tensor:
    out: torch.Tensor = reference(
        query, key, value, g=decay, beta=beta, use_qk_l2norm_in_kernel=True
    )[0]
    return out


def with_gradients(rule: Any, parts: list[torch.Tensor]) -> list[Any]:
    """Return the output, and the gradients of what it is made of."""
    leaves = [one.clone().requires_grad_() for one in parts]
    out = rule(*leaves)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
    return [out, *(one.grad for one in leaves)]


@pytest.mark.parametrize(
    "shape",
    [(1, 5, 2, 2, 8, 8), (2, 200, 2, 4, 16, 32), (3, 64, 2, 2, 32, 32), (1, 640, 1, 3, 32, 16)],
)
def test_as_the_reference(shape: tuple[int, ...]) -> None:
    parts = parts_of(*shape)
    found, wanted = (with_gradients(one, parts) for one in (gated_delta_rule, run_reference))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


def test_equal_keys_that_forget_nothing() -> None:
    """The triangle that is solved is as far from the identity as it can be: all of it is 1."""
    query, key, value, decay, beta = parts_of(1, 300, 1, 1, 8, 8)
    key, decay, beta = key[:, :1].expand_as(key), torch.zeros_like(decay), torch.ones_like(beta)
    found = gated_delta_rule(query, key, value, decay, beta)
    state = torch.zeros(8, 8, dtype=torch.float64)
    for token in range(300):
        q, k = (one[0, token, 0].double() for one in (query, key))
        q, k = (one * (one.square().sum() + 1e-6).rsqrt() for one in (q, k))
        state = state + torch.outer(k, value[0, token, 0].double() - k @ state)
        wanted = (q * 8**-0.5) @ state
        assert (found[0, token, 0] - wanted).abs().max() < 1e-5


def test_autocast_changes_nothing() -> None:
    parts = [one.bfloat16() for one in parts_of(1, 100, 2, 2, 16, 16)]
    wanted = gated_delta_rule(*parts)
    with torch.autocast("cpu", torch.bfloat16):
        found = gated_delta_rule(*parts)
    assert found.dtype == torch.bfloat16 and torch.equal(found, wanted)


class Written(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the numbers that operators write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result._base is None:
            self.numbers += result.numel()
        return result


def test_work_grows_with_the_chunks_and_not_with_their_square() -> None:
    grown = {}
    for name, rule in (("own", gated_delta_rule), ("reference", run_reference)):
        numbers = []
        for chunks in (16, 32):
            with Written() as written:
                with_gradients(rule, parts_of(1, 64 * chunks, 1, 1, 16, 16))
            numbers.append(written.numbers)
        grown[name] = numbers[1] / numbers[0]
    assert grown["own"] < 2.05 < 2.5 < grown["reference"]


def test_the_operator_is_sound() -> None:
    drawn = torch.Generator().manual_seed(0)
    new, read, key = (torch.randn(3, 2, 64, d, generator=drawn) for d in (8, 4, 4))
    parts = (new, read / 64, key, torch.rand(3, 2, 1, 1, generator=drawn))
    torch.library.opcheck(chunk_states, tuple(one.requires_grad_() for one in parts))
    precise = [one.detach().double().requires_grad_() for one in parts]
    assert torch.autograd.gradcheck(chunk_states, precise)
