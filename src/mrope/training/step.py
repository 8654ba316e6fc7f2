"""One training step: batches, copies to the device, forward, backward, optimizer."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from mrope.collate.layouts import to_model_layout
from mrope.errors import MRopeError
from mrope.guard.sync_guard import SyncGuard
from mrope.prepare.sampler import TokenBudgetSampler
from mrope.training.result import Step


def guarded_step(model: torch.nn.Module, batch: Mapping[str, Any]) -> SyncGuard:
    """Return the guard of one step, forward and backward; gradients are set anew."""
    model.zero_grad()
    with SyncGuard() as guard:
        model(**batch).loss.backward()
    return guard


def _steps(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[Any],
    count: int,
    device: torch.device,
) -> Iterator[Step]:
    """Train for `count` steps and yield each when it is done."""
    batches = endless(loader)
    for number in range(1, count + 1):
        start = time.perf_counter()
        batch, worker = next(batches)
        data_seconds = time.perf_counter() - start
        mask = batch.get("attention_mask")
        tokens = batch["input_ids"].numel() if mask is None else int(mask.sum())
        attached = "position_ids" in batch
        batch = to_device(batch, device)
        start = time.perf_counter()
        loss = model(**batch).loss
        finish(device)
        forward_seconds = time.perf_counter() - start
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield Step(number, loss.item(), tokens, data_seconds, forward_seconds, worker, attached)


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the batch as a model takes it, its tensors on the device; ints stay on the host."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in to_model_layout(batch).items()
    }


def endless(loader: DataLoader[Any]) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield batches and the process that made each, pass after pass."""
    for number in itertools.count():
        if isinstance(loader.batch_sampler, TokenBudgetSampler):
            loader.batch_sampler.set_epoch(number)
        yield from loader


def finish(device: torch.device) -> None:
    """Wait for a CUDA device to be done; others are."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise MRopeError("train.device is cuda, but torch sees no CUDA device")
    return torch.device(name)
