"""Which kernel torch is asked for; what it computes is compared on a GPU, `tests/cuda/check_packing.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mrope.hf import varlen

Calls = list[tuple[bool, bool, dict[str, Any]]]
# Without types in torch.
SETTINGS: Any = torch.backends.cuda


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Record each call of the kernel: whether flash and cuDNN are allowed, and its options."""
    found: Calls = []

    def kernel(query: Any, key: Any, value: Any, *borders: Any, **options: Any) -> Any:
        allowed = SETTINGS.flash_sdp_enabled(), SETTINGS.cudnn_sdp_enabled()
        found.append((*allowed, options))
        return query + key.repeat_interleave(query.shape[1] // key.shape[1], 1) + value.sum()

    monkeypatch.setattr(varlen, "_KERNEL", kernel)
    return found


def attend(causal: bool = False) -> Any:
    query, key = torch.ones(6, 4, 8), torch.ones(6, 2, 8)
    borders = torch.tensor([0, 2, 2, 6], dtype=torch.int32)
    return varlen.attend_varlen(query, key, key, borders, 4, 0.5, causal)


def test_flash_alone_is_allowed_where_torch_asks(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = SETTINGS.cudnn_sdp_enabled()
    for asks in (True, False):
        monkeypatch.setattr(varlen, "_ASKS", asks)
        attend()
        assert calls.pop()[:2] == ((True, False) if asks else (True, before))
        assert SETTINGS.cudnn_sdp_enabled() == before


def test_a_window_of_the_whole_segment_keeps_flash_in_torch_2_14(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "_ASKS", False)
    for takes in (True, False):
        monkeypatch.setattr(varlen, "_TAKES_CUDNN", takes)
        attend()
        assert calls.pop()[2].get("window_size") == ((4, 4) if takes else None)
        # The causal mask is a window already, which cuDNN's kernel was not taken for.
        attend(causal=True)
        assert calls.pop()[2].items() >= varlen._CAUSAL.items()


def test_asking_breaks_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(query: Any, key: Any, value: Any, *borders: Any, **options: Any) -> Any:
        # Read while the graph is made, as torch does.
        return query * (2 if torch._C._get_cudnn_sdp_enabled() else 3)

    monkeypatch.setattr(varlen, "_KERNEL", kernel)
    monkeypatch.setattr(varlen, "_ASKS", True)
    made: Any = torch.compile(attend, fullgraph=True, backend="eager")
    assert torch.equal(made(), torch.full((6, 4, 8), 3.0))


@pytest.mark.skipif(not varlen._ASKS, reason="torch has one kernel, or does not ask")
def test_torch_selects_flash() -> None:
    own: Any = varlen
    query, borders = torch.ones(6, 4, 8), torch.tensor([0, 6], dtype=torch.int32)
    flash = own.SDPBackend.FLASH_ATTENTION
    with own.sdpa_kernel(flash):
        found = own.varlen._select_backend(query, query, query, borders, borders, 6, [-1, -1])
    assert found == flash.value
