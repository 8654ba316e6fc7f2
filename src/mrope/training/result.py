"""What a training run measured: one `Step` for each optimizer step, and a `TrainResult`."""

from __future__ import annotations

import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        step: counted from 1.
        loss: as the model returned it.
        tokens: valid tokens of the batch.
        data_seconds: how long the loop waited for the batch.
        forward_seconds: how long `model(**batch)` took; on CUDA until the device is done.
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
    """What a run did.

    Attributes:
        rope_enabled: whether the collator attached the positions.
        steps: in order.
        parameters: number of the model's parameters.
        rope_index_calls: how often the model called its own `get_rope_index`; None where it has no
            such method, so that nothing could be counted.
        loop_pid: id of the process that trained.
        waits: places where one more step, forward and backward, makes the host wait for a CUDA
            device, counted by `mrope.guard.sync_guard`.
    """

    rope_enabled: bool
    steps: tuple[Step, ...]
    parameters: int
    rope_index_calls: int | None
    loop_pid: int
    waits: int

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [step.loss for step in self.steps]

    @property
    def data_median(self) -> float:
        """Median seconds that a step waited for its batch."""
        return statistics.median(step.data_seconds for step in self.steps)

    @property
    def forward_median(self) -> float:
        """Median seconds of a step's forward."""
        return statistics.median(step.forward_seconds for step in self.steps)
