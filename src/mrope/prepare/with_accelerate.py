"""Let accelerate, and transformers' `Trainer` on it, take batches that have their ranks already.

accelerate deals the batches of a loader out over ranks, which would lose those of a
`TokenBudgetSampler`: its batches are those of one rank. `Trainer` gives what `_get_train_sampler`
returns to a `DataLoader` as a sampler of single examples, and that to accelerate. From 5.17 on it
knows one sampler with ranks, by its class (`BatchRebalanceSampler`); earlier ones know none. So the
loader is put right in accelerate, which all of them call after the sampler is made.

Nothing here imports accelerate or transformers: a process that has an `Accelerator` has loaded it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import wraps
from itertools import count
from typing import TYPE_CHECKING

from torch.utils.data import BatchSampler, DataLoader, Sampler, SequentialSampler

from mrope.errors import MRopeError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mrope.prepare.sampler import TokenBudgetSampler

Loader = DataLoader[object]


class EpochsInTurn(Sampler[list[int]]):
    """Take batches from a sampler's epochs in turn, as many in each epoch as in the first.

    Epochs of a `TokenBudgetSampler` differ by some batches, and transformers' `Trainer` counts its
    steps, where it resumes and where it ends, by the length of the first. Here its epoch k is
    batches k * L to (k + 1) * L of all epochs of the sampler, one after another: none is left out
    at a border, and a resumed run continues at the batch where it stopped.
    """

    def __init__(self, batches: TokenBudgetSampler) -> None:
        self.batches = batches
        self.epoch = 0
        self._length = len(batches.plan(0).grid_SR)
        self._steps: dict[int, int] = {}

    @property
    def sampler(self) -> EpochsInTurn:
        """Return itself: accelerate looks here for `set_epoch` once it skips batches."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of later iterators."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        skipped, left = self.epoch * self._length, self._length
        for epoch in count():
            # Known epochs that are passed over are not planned again.
            if skipped >= (steps := self._steps.get(epoch, skipped + 1)):
                skipped -= steps
                continue
            plan = self.batches.plan(epoch)
            steps = self._steps[epoch] = len(plan.grid_SR)
            for step in range(min(skipped, steps), min(skipped + left, steps)):
                yield plan.batch(step, self.batches.rank)
                left -= 1
            if not left:
                return
            skipped = max(skipped - steps, 0)


def patch_accelerate(kind: type[TokenBudgetSampler]) -> None:
    """Replace `Accelerator.prepare_data_loader`: loaders over samplers of this kind keep batches.

    Once in a process, if accelerate is loaded; other loaders go on as before.
    """
    # Of the class, since a sampler sees neither the loader that is made over it nor the accelerator
    # of a `Trainer`. accelerate asks a sampler for no leave to deal its batches out; a loader that
    # says that it is prepared (`_is_accelerate_prepared`) is left alone, its device included.
    accelerator = getattr(sys.modules.get("accelerate.accelerator"), "Accelerator", None)
    if accelerator is None or hasattr(accelerator.prepare_data_loader, "mrope_own"):
        return
    own: Callable[..., object] = accelerator.prepare_data_loader

    @wraps(own)
    def prepare_data_loader(
        self: Accelerator, data_loader: Loader, *args: object, **kwargs: object
    ) -> object:
        given = data_loader.batch_sampler
        # `Trainer` takes it for a sampler of examples, and makes batches of what it yields.
        of_trainer = isinstance(getattr(given, "sampler", None), kind)
        sampler = getattr(given, "sampler", None) if of_trainer else given
        if not isinstance(sampler, kind):
            return own(self, data_loader, *args, **kwargs)
        _refuse_other_ranks(self, sampler)
        _refuse_resumed(sampler, of_trainer)
        # Prepared over a sampler without ranks, which nothing reads.
        _give_batches(data_loader, BatchSampler(SequentialSampler(()), 1, drop_last=False))
        loader = own(self, data_loader, *args, **kwargs)
        for one in (data_loader, getattr(loader, "base_dataloader", loader)):
            _give_batches(one, EpochsInTurn(sampler) if of_trainer else sampler)
        return loader

    prepare_data_loader.mrope_own = own  # type: ignore[attr-defined]
    accelerator.prepare_data_loader = prepare_data_loader


def _give_batches(loader: object, batches: Sampler[list[int]]) -> None:
    """Let a loader that has read nothing yet take other batches."""
    # Not by its setter, which refuses. Making the loader anew would lose what others gave it.
    vars(loader).update(batch_sampler=batches, batch_size=None, drop_last=False)


def _refuse_resumed(sampler: TokenBudgetSampler, of_trainer: bool) -> None:
    """Raise for a state that `Trainer` would pass over: it skips what a checkpoint has trained."""
    if of_trainer and sampler.resumed is not None:
        raise MRopeError(
            "TokenBudgetSampler was given a state by resume, and Trainer goes on by itself, with "
            "train(resume_from_checkpoint=...): give it a sampler without one"
        )


def _refuse_other_ranks(accelerator: Accelerator, sampler: TokenBudgetSampler) -> None:
    """Raise where the sampler does not make the batches that this process is to read."""
    if accelerator.dispatch_batches or accelerator.split_batches:
        raise MRopeError(
            "TokenBudgetSampler gives each rank its own batches: set neither dispatch_batches nor "
            "split_batches of accelerate"
        )
    ours = (sampler.rank, sampler.num_replicas)
    theirs = (accelerator.process_index, accelerator.num_processes)
    # Ranks that share a sequence, or parts of a tensor, take the same batches.
    if ours != theirs and getattr(accelerator, "parallelism_config", None) is None:
        raise MRopeError(
            f"TokenBudgetSampler was made for rank {ours[0]} of {ours[1]}, and accelerate runs "
            f"rank {theirs[0]} of {theirs[1]}: make it after Accelerator or TrainingArguments, "
            "which start torch.distributed"
        )
