"""The guard: what it sees, what it is silent about, and that it leaves nothing behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mrope import MRopeError
from mrope.guard import HostSyncError, SyncGuard
from snippets import SNIPPETS, Snippet

on_cpu_only = pytest.mark.skipif(
    torch.cuda.is_available(), reason="CUDA judges there: tests/cuda/check_guard.py"
)
pytestmark = on_cpu_only


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.name)
def test_every_snippet_is_reported_as_the_list_says(snippet: Snippet) -> None:
    body = snippet.make("cpu")
    with SyncGuard() as guard:
        body()
    ops = sorted(site.op for site in guard.sites for _ in range(site.count))
    assert ops == list(snippet.ops)
    assert guard.count == snippet.waits


def test_the_list_is_long_enough_to_mean_something() -> None:
    waiting = [snippet for snippet in SNIPPETS if snippet.waits]
    assert len(waiting) >= 25
    assert len(SNIPPETS) - len(waiting) >= 15


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.name)
def test_mode_error_raises_at_the_first_wait(snippet: Snippet) -> None:
    body = snippet.make("cpu")
    if not snippet.waits:
        with SyncGuard(mode="error"):
            body()
        return
    with pytest.raises(HostSyncError, match=r"waits for the device at .*snippets.py:\d+"):
        with SyncGuard(mode="error"):
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
        f"{__file__}:{site.line} read_twice: scalar read, 6 times\n6 waits at 1 sites"
    )


def test_results_are_those_without_the_guard() -> None:
    x = torch.randn(4, 4, requires_grad=True)

    def step() -> tuple[float, Any]:
        x.grad = None
        y = (x * torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device)).relu()
        loss = y[y > 0.1].sum() + y.cpu().sum() + y.to(torch.float64).sum()
        loss.backward()
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
    with pytest.raises(KeyError):
        with SyncGuard() as guard:
            x.sum().item()
            raise KeyError
    assert torch.from_numpy is own
    assert x.device == torch.device("cpu")
    x.sum().item()
    assert guard.count == 1


def test_guards_nest_and_can_be_used_again() -> None:
    x = torch.ones(3)
    with SyncGuard() as outer:
        with SyncGuard() as inner:
            x.sum().item()
        x.sum().item()
    assert inner.count == 1
    assert outer.count >= 1
    with inner:
        pass
    assert inner.count == 0


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(MRopeError, match="mode must be 'warn' or 'error', not 'raise'"):
        SyncGuard(mode="raise")  # type: ignore[arg-type]
