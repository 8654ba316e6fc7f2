"""`SyncGuard`: what it counts, what it does not count, and that it restores what it patches."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mrope import MRopeError
from mrope.guard import HostSyncError, SyncGuard, cuda_debug
from support.snippets import SNIPPETS, Snippet


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.name)
def test_every_snippet_is_reported_as_the_list_says(snippet: Snippet) -> None:
    body = snippet.make("cpu")
    with SyncGuard() as guard:
        body()
    ops = sorted(site.op for site in guard.sites for _ in range(site.count))
    assert ops == list(snippet.ops)
    assert guard.count == snippet.syncs


def test_the_list_is_long_enough_to_mean_something() -> None:
    syncing = [snippet for snippet in SNIPPETS if snippet.syncs]
    assert len(syncing) >= 25
    assert len(SNIPPETS) - len(syncing) >= 15


@pytest.mark.parametrize(
    "snippet", [one for one in SNIPPETS if one.syncs][::4], ids=lambda snippet: snippet.name
)
def test_mode_error_raises_at_the_first_sync(snippet: Snippet) -> None:
    body = snippet.make("cpu")
    with (
        pytest.raises(HostSyncError, match=r"syncs with the device at .*snippets.py:\d+"),
        SyncGuard(mode="error"),
    ):
        body()


def read_twice(x: torch.Tensor) -> float:
    return x.sum().item() + x.max().item()


def test_the_report_names_file_line_function_op_and_count() -> None:
    x = torch.ones(3)
    with SyncGuard() as guard:
        for _ in range(3):
            read_twice(x)
    (site,) = guard.sites
    assert site.file == __file__
    assert site.function == "read_twice"
    assert site.line == read_twice.__code__.co_firstlineno + 1
    assert (site.op, site.count) == ("scalar read", 6)
    assert guard.report() == (
        f"{__file__}:{site.line} read_twice: scalar read, 6 times\n6 syncs at 1 sites"
    )


def test_results_are_those_without_the_guard() -> None:
    x = torch.randn(4, 4, requires_grad=True)

    def step() -> tuple[float, Any]:
        x.grad = None
        y = (x * torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device)).relu()
        loss = y[y > 0.1].sum() + y.cpu().sum() + y.to(torch.float64).sum()
        torch.autograd.backward(loss)
        return loss.item(), x.grad

    expected_loss, expected = step()
    with SyncGuard():
        loss, gradient = step()
    assert loss == expected_loss
    assert torch.equal(gradient, expected)


def test_a_copy_on_the_host_does_not_make_its_source_a_host_tensor() -> None:
    x = torch.ones(3)
    with SyncGuard() as guard:
        x.cpu().tolist()
        x.tolist()
    assert [site.op for site in guard.sites] == ["copy from the device", "tolist"]


def test_declared_host_tensors_and_their_views_and_results_are_silent() -> None:
    grid, x = torch.tensor([[1, 4, 4]]), torch.ones(3)
    with SyncGuard(host=[grid]) as guard:
        sizes = (grid[:, 1] * grid[:, 2]).tolist()
        assert grid.device == torch.device("cpu") != x.device
        torch.arange(sizes[0], device=grid.device).tolist()
        assert torch.from_numpy(np.ones(2)).sum().item() == 2
        assert torch.frombuffer(bytearray(2), dtype=torch.uint8).tolist() == [0, 0]
    assert guard.count == 0, guard.report()


def test_what_is_computed_with_a_device_tensor_is_on_the_device() -> None:
    x = torch.ones(3)
    with SyncGuard() as guard:
        buffer = torch.zeros(3)
        buffer.add_(x)
        buffer.sum().item()
        (torch.tensor(2.0) * x).sum().item()
    assert guard.count == 2


def test_nothing_is_left_behind_after_an_error() -> None:
    x, own = torch.ones(3), torch.from_numpy
    guard = SyncGuard()

    def body() -> None:
        with guard:
            x.sum().item()
            raise KeyError

    with pytest.raises(KeyError):
        body()
    assert torch.from_numpy is own
    assert x.device == torch.device("cpu")
    x.sum().item()
    assert guard.count == 1


def test_guards_nest_and_can_be_used_again() -> None:
    x = torch.ones(3)
    with SyncGuard() as outer:
        with SyncGuard() as inner:
            made = torch.zeros(3, device=x.device)
            made.tolist()
            x.cpu().tolist()
        made.tolist()
    assert (inner.count, outer.count) == (2, 3)
    with inner:
        pass
    assert inner.count == 0


def test_an_inner_guard_raises_after_the_outer_one_has_counted() -> None:
    x = torch.ones(3)

    def body() -> None:
        with SyncGuard(mode="error"):
            x.tolist()

    with SyncGuard() as outer, contextlib.suppress(HostSyncError):
        body()
    assert outer.count == 1


def test_a_guard_watches_one_block_at_a_time() -> None:
    guard, x = SyncGuard(), torch.ones(3)

    def body() -> None:
        with guard, guard:
            raise AssertionError("not reached")

    with pytest.raises(MRopeError, match="watches a block already"):
        body()
    x.tolist()
    assert x.device == torch.device("cpu")
    assert guard.count == 0


def test_every_way_to_name_a_cuda_device_is_understood() -> None:
    x = torch.ones(3)
    with SyncGuard() as guard:
        for moved in (x.cuda(), x.cuda(0), x.to(0), x.to("cuda:0"), x.to(device="cuda")):
            assert moved.device == x.device
        torch.nn.Linear(2, 2, device=0).cuda().requires_grad_()
        torch.tensor(5, device="cpu").tolist()
    assert guard.count == 0, guard.report()


def test_an_error_that_the_block_swallows_is_raised_at_its_end() -> None:
    with (
        pytest.raises(HostSyncError, match="scalar read"),
        SyncGuard(mode="error"),
        contextlib.suppress(ValueError),
    ):
        torch.ones(1, device="cpu:0").item()


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(MRopeError, match="mode must be 'warn' or 'error', not 'raise'"):
        SyncGuard(mode="raise")  # type: ignore[arg-type]


def test_memory_that_views_and_moves_share_is_told_apart() -> None:
    x = torch.arange(6.0)
    with SyncGuard() as guard:
        host = x.cpu()
        host.view(2, 3)[0].sum().item()
        host.to(x.device)
        assert torch.zeros_like(x, device="cpu").tolist() == [0.0] * 6
        torch.LongTensor([1, 2]).tolist()
        x.view(2, 3)[0].sum().item()
    assert [site.op for site in guard.sites] == [
        "copy from the device",
        "copy to the device",
        "scalar read",
    ]


def test_a_backward_after_the_block_is_not_counted() -> None:
    x = torch.ones(3, requires_grad=True)
    with SyncGuard() as guard:
        loss = x.cpu().sum()
    torch.autograd.backward(loss)
    assert guard.count == 1


def test_a_checkpoint_is_watched_under_autograd_grad_too() -> None:
    x = torch.ones(3, requires_grad=True)

    def forward(y: torch.Tensor) -> torch.Tensor:
        y.tolist()
        return y.exp()

    with SyncGuard() as guard:
        torch.autograd.grad(checkpoint(forward, x, use_reentrant=False).sum(), x)
    assert guard.count == 2


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str | int]:
    """Pretend that CUDA is in use; the list holds the sync debug modes that were set."""
    settings: list[str | int] = []
    monkeypatch.setattr(cuda_debug, "is_used", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", settings.append)
    return settings


def synchronize() -> None:
    warnings.warn("called a synchronizing CUDA operation", stacklevel=1)


def test_on_cuda_warnings_of_torch_are_counted_at_their_site(fake_cuda: list[str | int]) -> None:
    def body() -> SyncGuard:
        with SyncGuard() as guard:
            synchronize()
            synchronize()
            warnings.warn("a warning of the user's own", stacklevel=1)
        return guard

    with pytest.warns(UserWarning, match="of the user's own"):
        guard = body()
    (site,) = guard.sites
    assert (site.file, site.function, site.count) == (__file__, "synchronize", 2)
    assert fake_cuda == ["warn", 0]


def test_on_cuda_errors_of_torch_become_host_sync_errors(fake_cuda: list[str | int]) -> None:
    def fail() -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    with (
        pytest.raises(HostSyncError, match=rf"{__file__}:\d+ fail: CUDA"),
        SyncGuard(mode="error"),
    ):
        fail()
    with pytest.raises(RuntimeError, match="of another kind"), SyncGuard(mode="error"):
        raise RuntimeError("an error of another kind")
    assert fake_cuda == ["error", 0, "error", 0]
