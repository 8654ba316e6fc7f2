"""The training step's timing: on CUDA a step comes out when the next one is launched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from mrope.training import step
from mrope.training.result import Step

COUNT = 4


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.calls = 0

    def forward(self, input_ids: torch.Tensor) -> Any:
        self.calls += 1
        return SimpleNamespace(loss=(self.weight * input_ids).mean())


class Event:
    """A CUDA event: times are known once the host has waited for the last one."""

    waited = 0

    def synchronize(self) -> None:
        Event.waited += 1

    def elapsed_time(self, _: Event) -> float:
        return 5.0


def run(device: Any) -> tuple[list[Step], list[int]]:
    """Return the steps, and how many were launched when each came out."""
    torch.manual_seed(0)
    model = Model()
    rows: Any = [({"input_ids": torch.rand(2, 3)}, 7) for _ in range(3)]
    loader: Any = DataLoader(rows, batch_size=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps, launched = [], []
    for one in step.train_steps(model, optimizer, loader, COUNT, device):
        steps.append(one)
        launched.append(model.calls)
    return steps, launched


def test_on_a_cpu_each_step_comes_out_at_once() -> None:
    steps, launched = run(torch.device("cpu"))
    assert [one.step for one in steps] == launched == [1, 2, 3, 4]
    assert all(0 < one.forward_seconds < 1 for one in steps)


def test_on_cuda_the_device_is_one_step_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = run(torch.device("cpu"))
    monkeypatch.setattr(step, "_mark", lambda _: Event())
    monkeypatch.setattr(step, "to_device", lambda batch, _: batch)
    steps, launched = run(SimpleNamespace(type="cuda"))
    assert launched == [2, 3, 4, 4]
    assert [(one.step, one.loss) for one in steps] == [(one.step, one.loss) for one in expected]
    assert {one.forward_seconds for one in steps} == {0.005}
    assert Event.waited == COUNT
