"""Sample batches up to budgets of tokens and patches, and of similar work in each step.

For `torch.utils.data.DataLoader(batch_sampler=...)`. With tokens alone, first-fit places the
examples in shuffled order, so that each batch is a random mixture of lengths. In the order of
length it would need slightly fewer batches, and every batch would hold examples of about one
length.

Shape suffixes: N examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
from torch.utils.data import Sampler

from mrope.arrays import as_whole
from mrope.collate.ladder import Shapes
from mrope.columns import Columns, NewColumns
from mrope.errors import MRopeError
from mrope.prepare.budgets import Cost, Lengths, read_budgets, read_work
from mrope.prepare.planning import EpochPlan, Planner
from mrope.prepare.ranks import find_rank
from mrope.prepare.saved import find_states
from mrope.prepare.with_accelerate import patch_accelerate

Earlier = tuple[tuple[int, int], ...]
"""(ranks, steps): how many ranks took how many steps of an epoch, before others went on."""

# What a saved position depends on. The rank is absent: any rank can resume from any rank's state.
_SETTINGS = ("max_tokens", "max_examples", "pad_to_multiple_of", "shuffle", "seed", "drop_last")
# States of samplers that have none may lack them.
_LATER_SETTINGS = ("max_patches", "shapes")
_STATE = ("epoch", "yielded", "num_replicas", "digest", "examples", *_SETTINGS)


class TokenBudgetSampler(Sampler[list[int]]):
    """Fill batches with examples up to budgets of tokens and patches, evenly over ranks.

    accelerate's `Accelerator.prepare` takes a loader over it as it is, and transformers' `Trainer`
    takes it from `_get_train_sampler`.

    The plan of an epoch depends only on the arguments and the epoch: all ranks compute the same
    one, without communication. With `max_tokens` alone an example goes into the first batch that
    has room for it, see `first_fit`. With `patches` or `cost`, and `shuffle`, examples are dealt,
    see `deal_evenly`.

    Args:
        lengths: (N,) tokens of each example, placeholders of images and videos included.
        max_tokens: maximum number of tokens in a batch, after rounding up.
        patches: (N,) patches of each example, images and clips together; 0 for text.
        max_patches: maximum number of patches in a batch; None: no limit but that of `shapes`.
        cost: work of examples, by which the batches of a step are made similar: a `WorkModel`, or
            a function of `lengths` and `patches` (zeros if None), both int64 (N,), and of
            `patch_pairs` if given, that returns (N,) numbers of 0 or more. A batch's work is the
            sum. None: the work is the tokens.
        patch_pairs: (N,) sum of squared patches over the images and frames of each example, for
            `cost`: pairs of patches that attend to each other in the vision tower.
        shapes: the collator's ladder. No batch is above its top rungs of tokens and patches, nor
            has more examples, and images and frames if `segments` is given, than those have borders
            for. Needs `patches`.
        segments: (N,) images and frames of each example, for `shapes`.
        max_examples: maximum number of examples in a batch; None: no limit but that of `shapes`.
        pad_to_multiple_of: the collator's value: a flattened row is padded to a multiple of it.
        shuffle: take the examples in random order, a different one in each epoch; see `set_epoch`.
            False: in the order of the dataset, and batches in the order of their first examples.
        seed: seed of the random order; the same on all ranks.
        drop_last: what to do if the number of batches is not a multiple of the ranks. False: split
            batches in two, the one with the most tokens first, until it is; repeat some only if
            every batch is down to one example. True: drop the surplus batches with the fewest
            tokens. With one rank neither happens. Dealt examples get a multiple to begin with.
        rank, num_replicas: default to those of torch.distributed if it is initialised, else 0 and
            1.

    With `shuffle`, the batches of one step have similar work: batches are sorted by work and
    grouped into steps; then the steps, and the ranks within each step, are shuffled. Without it, a
    step takes the next batches in order.

    Raises:
        TypeError: an argument that must be an int is not.
        ValueError: an argument is out of range, or needs another one.
        MRopeError: there are no lengths, one is not an integer above 0, another column is not of
            one number of 0 or more for each example, or an example does not fit into an empty
            batch.

    Example:
        >>> sampler = TokenBudgetSampler([6, 5, 3, 4, 2], max_tokens=10, shuffle=False)
        >>> list(sampler)
        [[0, 2], [1, 3], [4]]
    """

    def __init__(
        self,
        lengths: Lengths,
        max_tokens: int,
        *,
        patches: Lengths | None = None,
        max_patches: int | None = None,
        cost: Cost | None = None,
        patch_pairs: Lengths | None = None,
        shapes: Shapes | None = None,
        segments: Lengths | None = None,
        max_examples: int | None = None,
        pad_to_multiple_of: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        rank: int | None = None,
        num_replicas: int | None = None,
    ) -> None:
        self.max_tokens = as_whole("max_tokens", max_tokens, 1)
        self.max_patches = None if max_patches is None else as_whole("max_patches", max_patches, 1)
        self.max_examples = (
            None if max_examples is None else as_whole("max_examples", max_examples, 1)
        )
        self.pad_to_multiple_of = as_whole("pad_to_multiple_of", pad_to_multiple_of, 1)
        self.shuffle = bool(shuffle)
        self.seed = as_whole("seed", seed, 0)
        self.drop_last = bool(drop_last)
        self.rank, self.num_replicas = find_rank(rank, num_replicas)
        self.shapes = None if shapes is None else str(shapes)
        if self.max_tokens < self.pad_to_multiple_of:
            raise ValueError(
                f"max_tokens {max_tokens} is below pad_to_multiple_of {pad_to_multiple_of}"
            )
        rungs = None if shapes is None else shapes.patches or None
        _require("patches", patches, max_patches=max_patches, shapes=rungs, patch_pairs=patch_pairs)
        _require("shapes", shapes, segments=segments)
        _require("cost", cost, patch_pairs=patch_pairs)
        if cost is not None and not self.shuffle:
            raise ValueError("cost needs shuffle=True: without it a step takes the next batches")
        self.budgets = read_budgets(
            {"tokens": lengths, "patches": patches, "segments": segments},
            {name: getattr(self, f"max_{name}") for name in ("tokens", "patches", "examples")},
            shapes,
            self.pad_to_multiple_of,
        )
        lengths_N = self.budgets["tokens"].sizes_N
        self.work_N = None if cost is None else read_work(cost, lengths_N, patches, patch_pairs)
        self.epoch = 0
        self._made: tuple[Any, EpochPlan] | None = None
        self.resumed: Columns | None = None
        patch_accelerate(TokenBudgetSampler)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, and so the order, of later iterators, as in `DistributedSampler`."""
        self.epoch = as_whole("epoch", epoch, 0)

    def __len__(self) -> int:
        """Return the number of batches of a rank in the epoch set; it may differ between epochs."""
        return len(self.plan(self.epoch).grid_SR)

    def __iter__(self) -> TokenBudgetIterator:
        return TokenBudgetIterator(self)

    def resume(self, state: Columns | None) -> None:
        """Let the next pass go on from a saved position, on any number of ranks and workers.

        Args:
            state: `state_dict()` of an iterator, or that of a `StatefulDataLoader`, which itself
                refuses the state of another number of workers. Any rank's; None: from the start.

        Raises:
            MRopeError: as `TokenBudgetIterator.load_state_dict`.
        """
        self.resumed = None
        if state is not None:
            batches = iter(self)
            batches.load_state_dict(state)
            # At the end of its epoch nothing is left, and the next pass is a whole one.
            self.resumed = state if batches.has_more() else None

    def plan(self, epoch: int, earlier: Earlier = (), num_replicas: int | None = None) -> EpochPlan:
        """Compute the batches of all ranks in an epoch; the last plan is cached.

        Args:
            epoch: the epoch.
            earlier: what other numbers of ranks took of it, in turn. The plan is then that of the
                rest: no example that they took, and every other.
            num_replicas: the number of ranks; None: the sampler's.

        Raises:
            MRopeError: `drop_last` leaves no batch at all.
        """
        key = epoch, earlier, num_replicas or self.num_replicas
        if self._made is None or self._made[0] != key:
            self._made = key, self._make(*key)
        return self._made[1]

    @property
    def batch_size(self) -> NoReturn:
        """Unavailable by design: callers that read it would shard batches twice.

        Raises:
            MRopeError: there are several ranks; sharding their batches again would lose examples.
            AttributeError: there is one rank.
        """
        if self.num_replicas == 1:
            raise AttributeError("batches up to a token budget have no batch_size")
        raise MRopeError(
            f"TokenBudgetSampler has already sharded its batches over {self.num_replicas} ranks, "
            "and its caller would shard them again, which loses most examples: do not let it. "
            "accelerate takes them as they are if it was imported before the sampler was made"
        )

    def _make(self, epoch: int, earlier: Earlier, ranks: int) -> EpochPlan:
        # Seed and epoch as a pair: as a sum, epoch 1 of seed 0 would equal epoch 0 of seed 1.
        key = (self.seed, epoch, *(number for pair in earlier for number in pair))
        rng = np.random.default_rng(key) if self.shuffle else None
        left_N = np.arange(len(self.budgets["tokens"].sizes_N))
        if earlier:
            others, steps = earlier[-1]
            left_N = self.plan(epoch, earlier[:-1], others).left(steps)
        plan = Planner(self.budgets, self.work_N, self.drop_last).plan(left_N, ranks, rng)
        if not len(plan.grid_SR) and not earlier:
            raise MRopeError(
                f"drop_last=True leaves no batch: {len(left_N)} examples fill "
                f"{len(plan.borders) - 1} batches of {self.max_tokens} tokens, for {ranks} ranks; "
                "lower max_tokens, or use drop_last=False"
            )
        return plan

    def settings(self) -> dict[str, int | str | None]:
        """Return what a saved position depends on besides the examples."""
        names = (*_SETTINGS, *_LATER_SETTINGS)
        return {
            "examples": len(self.budgets["tokens"].sizes_N),
            **{name: getattr(self, name) for name in names},
        }


class TokenBudgetIterator(Iterator[list[int]]):
    """Iterate once over a rank's batches, with a position that can be saved and restored.

    The iterator keeps the position, not the sampler, since a loader with workers draws batches
    ahead of those it returns; `torchdata.stateful_dataloader.StatefulDataLoader` accounts for that.
    `state_dict` has the same value on all ranks.
    """

    def __init__(self, sampler: TokenBudgetSampler) -> None:
        self._sampler = sampler
        self._epoch = sampler.epoch
        self._earlier: Earlier = ()
        self._plan: EpochPlan | None = None
        self._yielded = 0

    def __next__(self) -> list[int]:
        if not self.has_more():
            raise StopIteration
        self._yielded += 1
        return self._planned().batch(self._yielded - 1, self._sampler.rank)

    def has_more(self) -> bool:
        """Return whether any batch of the epoch is left."""
        return self._yielded < len(self._planned().grid_SR)

    def state_dict(self) -> NewColumns:
        """Return the epoch, the number of batches drawn, and the plan's identity; plain values."""
        plan = self._planned()
        identity = {**self._sampler.settings(), "num_replicas": plan.grid_SR.shape[1]}
        # Where other numbers of ranks went before, what each took, as JSON would hold it.
        earlier = {"earlier": [list(one) for one in self._earlier]} if self._earlier else {}
        place = {"epoch": self._epoch, "yielded": self._yielded}
        return {**place, **identity, "digest": plan.digest, **earlier}

    def load_state_dict(self, state_dict: Columns) -> None:
        """Continue from a saved position, in its epoch, regardless of the sampler's epoch.

        A state of another number of ranks is taken too: what all of them took is left out, and the
        rest of the epoch is dealt to the ranks of now. A loader that saves its state some batches
        late would skip as many of these: pass its state to `TokenBudgetSampler.resume`.

        Raises:
            MRopeError: the state has other lengths, another seed or another setting, with which
                the remaining batches would differ.
        """
        sampler = self._sampler
        saved = _read_state(state_dict)
        epoch, ranks, yielded = (saved[name] for name in ("epoch", "num_replicas", "yielded"))
        earlier: Earlier = tuple((int(of), int(steps)) for of, steps in saved["earlier"])
        for name, value in sampler.settings().items():
            if saved[name] != value:
                raise MRopeError(
                    f"cannot resume: the state was saved with {name} {saved[name]}, the sampler "
                    f"has {value}; its batches are not the same"
                )
        plan = sampler.plan(epoch, earlier, ranks)
        if saved["digest"] != plan.digest:
            raise MRopeError(
                "cannot resume: since the state was saved, the lengths of some examples, or "
                "their order, changed (or their patches or cost; or numpy's way of shuffling, "
                "with its release)"
            )
        if not 0 <= yielded <= len(plan.grid_SR):
            raise MRopeError(
                f"cannot resume after batch {yielded} of an epoch of {len(plan.grid_SR)} batches"
            )
        if ranks != sampler.num_replicas:
            # Before the first step nothing is taken, and the plan of these ranks is a whole one.
            earlier += ((ranks, yielded),) if yielded else ()
            plan, yielded = sampler.plan(epoch, earlier), 0
        self._epoch, self._earlier, self._plan, self._yielded = epoch, earlier, plan, yielded
        sampler.resume(None)

    def _planned(self) -> EpochPlan:
        # Not at construction: a loader calls `iter` before it restores a state of another epoch,
        # and twice if it has workers.
        if self._plan is None and (state := self._sampler.resumed) is not None:
            self.load_state_dict(state)
        if self._plan is None:
            self._plan = self._sampler.plan(self._epoch)
        return self._plan


def _read_state(state: Columns) -> NewColumns:
    """Return the state of an iterator, from it or from that of a `StatefulDataLoader`.

    Raises:
        MRopeError: it is neither.
    """
    found, late = find_states(state, "TokenBudgetSampler", {"epoch", "yielded"})[0]
    found = {"earlier": (), **dict.fromkeys(_LATER_SETTINGS), **found}
    for name in _STATE:
        if name not in found:
            raise MRopeError(f"not a state of TokenBudgetSampler: it has no {name}")
    counts = [
        found["epoch"],
        found["num_replicas"],
        *(one for pair in found["earlier"] for one in pair),
    ]
    if any(type(count) is not int or count < 0 for count in counts) or not found["num_replicas"]:
        raise MRopeError(
            "not a state of TokenBudgetSampler: epoch, num_replicas and earlier are "
            f"{found['epoch']!r}, {found['num_replicas']!r} and {found['earlier']!r}"
        )
    return found | {"yielded": found["yielded"] + late}


def _require(name: str, value: object, **without: object) -> None:
    """Raise if an argument is not given, but others that are useless without it are."""
    for other, given in without.items():
        if given is not None and value is None:
            raise ValueError(f"{other} needs {name}")
