"""Results of a training run: a `Step` for each optimizer step, and a `TrainResult`."""

from __future__ import annotations

import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        step: number of the step, from 1.
        loss: as the model returned it.
        tokens: valid tokens of the batch.
        data_seconds: time from asking the DataLoader for the batch until it came.
        forward_seconds: duration of `model(**batch)`; on CUDA as the device ran it, by events.
        worker: id of the process that collated the batch.
        attached: whether the batch came with `position_ids`.
    """

    step: int
    loss: float
    tokens: int
    data_seconds: float
    forward_seconds: float
    worker: int
    attached: bool


@dataclass(frozen=True)
class TrainResult:
    """Result of one run.

    Attributes:
        rope_enabled: whether the collator added position ids.
        steps: in order.
        parameters: number of the model's parameters.
        rope_index_calls: calls of the model's own `get_rope_index`; None if it has no such method,
            so that nothing could be counted.
        loop_pid: id of the process that trained.
        syncs: number of syncs with a CUDA device in one more step, forward and backward, as
            `mrope.guard.SyncGuard` counts them.
    """

    rope_enabled: bool
    steps: tuple[Step, ...]
    parameters: int
    rope_index_calls: int | None
    loop_pid: int
    syncs: int

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [step.loss for step in self.steps]

    @property
    def data_median(self) -> float:
        """Median seconds from asking for a batch until it came."""
        return statistics.median(step.data_seconds for step in self.steps)

    @property
    def forward_median(self) -> float:
        """Median seconds of a step's forward."""
        return statistics.median(step.forward_seconds for step in self.steps)
