"""Run training steps: fetch a batch, copy it to the device, forward, backward, optimizer."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from mrope.collate.layouts import to_model_layout
from mrope.errors import MRopeError
from mrope.guard import SyncGuard
from mrope.prepare.sampler import TokenBudgetSampler
from mrope.prepare.streams import TokenBudgetStream
from mrope.training.result import Step

_Mark = float | torch.cuda.Event


def guarded_step(model: torch.nn.Module, batch: Mapping[str, Any]) -> SyncGuard:
    """Run forward and backward of one step under a guard, and return the guard.

    Gradients are reset first and stay set; no optimizer runs.
    """
    model.zero_grad()
    with SyncGuard() as guard:
        model(**batch).loss.backward()
    return guard


def train_steps(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[Any],
    count: int,
    device: torch.device,
) -> Iterator[Step]:
    """Train for `count` steps, and yield each when it is done.

    On CUDA a step is yielded after the next one is launched, and nothing in the loop syncs: the
    device always has a step to run while the host reads the loss of the one before.

    Args:
        model: in training mode, on `device`.
        optimizer: of the model's parameters.
        loader: as `make_loader` makes it; read again from the start when it is exhausted.
        count: number of optimizer steps.
        device: where batches are copied.
    """
    batches = endless(loader)
    launched: deque[_LaunchedStep] = deque()
    ahead = 1 if device.type == "cuda" else 0
    for number in range(1, count + 1):
        start = time.perf_counter()
        batch, worker = next(batches)
        data_seconds = time.perf_counter() - start
        # Counted before the copy: on the device it would sync. Flattened batches have no mask.
        mask = batch.get("attention_mask")
        tokens = batch["input_ids"].numel() if mask is None else int(mask.sum())
        attached = "position_ids" in batch
        batch = to_device(batch, device)
        began = _mark(device)
        loss = model(**batch).loss
        ended = _mark(device)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        # torch makes the copy in pinned memory, so that it does not block.
        on_host = loss.detach().to("cpu", non_blocking=True)
        known = (number, tokens, data_seconds, worker, attached)
        launched.append(_LaunchedStep(known, on_host, began, ended, _mark(device)))
        if len(launched) > ahead:
            yield launched.popleft().result()
    yield from (one.result() for one in launched)


@dataclass(frozen=True)
class _LaunchedStep:
    """A step that a CUDA device may still be running, with its loss on the way to the host.

    Attributes:
        known: number, tokens, data_seconds, worker and attached of its `Step`.
        loss: its loss, on the host, complete once `done` is reached.
        began, ended, done: marks before and after the forward, and after the copy of the loss.
    """

    known: tuple[int, int, float, int, bool]
    loss: torch.Tensor
    began: _Mark
    ended: _Mark
    done: _Mark

    def result(self) -> Step:
        """Block until the device has reached `done`, and return the step."""
        number, tokens, data_seconds, worker, attached = self.known
        if not isinstance(self.done, float):
            self.done.synchronize()
        forward_seconds = _seconds_between(self.began, self.ended)
        return Step(
            number, self.loss.item(), tokens, data_seconds, forward_seconds, worker, attached
        )


def _mark(device: torch.device) -> _Mark:
    """Return the time, or on CUDA an event: the device runs behind the host."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _seconds_between(began: Any, ended: Any) -> float:
    if isinstance(began, float):
        return float(ended - began)
    milliseconds: float = began.elapsed_time(ended)
    return milliseconds / 1000


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the batch in model layout, with its tensors on the device.

    Ints, bools and lists stay on the host, where attached models read them without a sync.
    """
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in to_model_layout(batch).items()
    }


def endless(loader: DataLoader[Any]) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield batches, each with the id of the process that made it, epoch after epoch."""
    for epoch in itertools.count():
        for source in (loader.batch_sampler, loader.dataset):
            if isinstance(source, TokenBudgetSampler | TokenBudgetStream):
                # Unlike torch's own shuffling, its order depends on the epoch alone.
                source.set_epoch(epoch)
        yield from loader


def finish(device: torch.device) -> None:
    """Block until a CUDA device is done; other devices run in step with the host."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def choose_device(name: str) -> torch.device:
    """Return the device that `train.device` names; "auto" is CUDA if torch sees one.

    Raises:
        MRopeError: "cuda", and torch sees none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise MRopeError(
            "train.device is cuda, but torch sees no CUDA device: set it to cpu or auto, or "
            "install a CUDA build of torch"
        )
    return torch.device(name)
