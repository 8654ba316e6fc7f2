"""Batches up to a token budget, for `torch.utils.data.DataLoader(batch_sampler=...)`.

First-fit takes the examples in their shuffled order and is not shown their lengths beforehand, so
that who meets whom in a batch stays random. Sorted by length, it would need a few batches less, and
every batch would hold examples of one length.

Shape suffixes: N examples, B batches of all ranks, S steps of an epoch, R ranks.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torch.utils.data import Sampler

from mrope.errors import MRopeError
from mrope.prepare.binning import first_fit, split_largest

Lengths = Sequence[int] | npt.NDArray[np.integer[Any]]
_Ints = npt.NDArray[np.int64]

_SETTINGS = (
    "max_tokens",
    "max_examples",
    "pad_to_multiple_of",
    "shuffle",
    "seed",
    "drop_last",
    "num_replicas",
)


@dataclass(frozen=True)
class EpochPlan:
    """The batches of one epoch, of all ranks.

    Attributes:
        examples_N: int64 (N,), indices of the examples, batch after batch.
        borders: int64 (B + 1,), where each batch begins and ends among them.
        grid_SR: int64 (S, R), which batch each rank takes at each step.
        identity: what the plan was made from, and a digest of it; plain values.
    """

    examples_N: _Ints
    borders: _Ints
    grid_SR: _Ints
    identity: Mapping[str, int | str | None]

    def batch(self, step: int, rank: int) -> list[int]:
        """Return the indices of the examples that `rank` takes at `step`."""
        number = self.grid_SR[step, rank]
        start, stop = self.borders[number : number + 2]
        examples: list[int] = self.examples_N[start:stop].tolist()
        return examples


class TokenBudgetSampler(Sampler[list[int]]):
    """Fill batches with examples up to a token budget, first-fit, evenly over ranks.

    An example goes into the first batch with room for it, see `first_fit`. The plan of an epoch
    follows from the arguments and the epoch alone: ranks agree on it without talking to each other.

    Args:
        lengths: tokens of each example of the dataset, placeholders of images and videos included.
        max_tokens: no batch has more tokens than this, also after rounding up.
        max_examples: no batch has more examples than this; None: no bound.
        pad_to_multiple_of: what the collator rounds a flattened row up to.
        shuffle: take the examples in random order, another one in each epoch; see `set_epoch`.
            False: in the order of the dataset, and batches in the order of their first examples.
        seed: of the random order; the same on all ranks.
        drop_last: what happens when the number of batches is no multiple of the ranks. False:
            batches are cut in two, the one with the most tokens first, until it is. Only if all are
            down to one example, some are repeated. True: the surplus with the fewest tokens is
            dropped. One rank alone neither cuts nor drops.
        rank, num_replicas: default: torch.distributed's, if it is initialised, else 0 and 1.

    With `shuffle`, the batches of one step have similar token counts: batches are sorted by tokens
    and cut into steps, and then steps, and ranks within a step, are shuffled. Without it, a step
    takes the next batches as they come.

    Raises:
        TypeError, ValueError: an argument of another kind or value.
        MRopeError: there are no lengths, one is not an integer above 0, or an example alone does
            not fit into a batch.

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
        max_examples: int | None = None,
        pad_to_multiple_of: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        rank: int | None = None,
        num_replicas: int | None = None,
    ) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        if num_replicas is None:
            num_replicas = dist.get_world_size() if distributed else 1
        if rank is None:
            rank = dist.get_rank() if distributed else 0
        self.max_tokens = _whole("max_tokens", max_tokens, 1)
        self.max_examples = (
            None if max_examples is None else _whole("max_examples", max_examples, 1)
        )
        self.pad_to_multiple_of = _whole("pad_to_multiple_of", pad_to_multiple_of, 1)
        self.shuffle = bool(shuffle)
        self.seed = _whole("seed", seed, 0)
        self.drop_last = bool(drop_last)
        self.num_replicas = _whole("num_replicas", num_replicas, 1)
        self.rank = _whole("rank", rank, 0)
        if self.rank >= self.num_replicas:
            raise ValueError(f"rank must be below num_replicas ({num_replicas}), not {rank}")
        # A row is rounded up to the multiple, so that its tokens must stay below the last one.
        self.capacity = self.max_tokens // self.pad_to_multiple_of * self.pad_to_multiple_of
        if not self.capacity:
            raise ValueError(
                f"max_tokens {max_tokens} is below pad_to_multiple_of {pad_to_multiple_of}"
            )
        self.lengths_N = _checked(lengths, self.capacity, self.max_tokens)
        self.epoch = 0
        self._made: tuple[int, EpochPlan] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the random order of the passes begun from now on, as in `DistributedSampler`."""
        self.epoch = _whole("epoch", epoch, 0)

    def __len__(self) -> int:
        """Return the batches of each rank in the epoch set; with `shuffle`, epochs may differ."""
        return len(self.plan(self.epoch).grid_SR)

    def __iter__(self) -> TokenBudgetIterator:
        return TokenBudgetIterator(self)

    def plan(self, epoch: int) -> EpochPlan:
        """Return the batches of all ranks in an epoch; the plan asked for last is kept.

        Raises:
            MRopeError: `drop_last` leaves no batch at all.
        """
        if self._made is None or self._made[0] != epoch:
            self._made = epoch, self._make(epoch)
        return self._made[1]

    @property
    def batch_size(self) -> NoReturn:
        """Not there, as batches differ in size; who asks for it is about to deal batches out.

        Raises:
            MRopeError: the batches were dealt out to ranks already; a second time loses examples.
            AttributeError: there is one rank.
        """
        if self.num_replicas == 1:
            raise AttributeError("batches up to a token budget have no batch_size")
        raise MRopeError(
            f"TokenBudgetSampler has dealt its batches out to {self.num_replicas} ranks, and "
            "something (accelerate's prepare, for one) is about to deal them out again: most "
            "examples would be lost; use accelerate.data_loader.prepare_data_loader(loader, "
            "num_processes=1, process_index=0), or do not prepare the loader"
        )

    def _make(self, epoch: int) -> EpochPlan:
        rng = np.random.default_rng((self.seed, epoch)) if self.shuffle else None
        examples = len(self.lengths_N)
        order_N = np.arange(examples) if rng is None else rng.permutation(examples)
        batch_N = first_fit(self.lengths_N[order_N], self.capacity, self.max_examples)
        examples_N = order_N[np.argsort(batch_N, kind="stable")]
        tokens_N = self.lengths_N[examples_N]
        borders = np.concatenate(([0], np.bincount(batch_N).cumsum()))
        if not self.drop_last:
            borders = split_largest(tokens_N, borders, (1 - len(borders)) % self.num_replicas)
        grid_SR = self._grid(np.add.reduceat(tokens_N, borders[:-1]), rng)
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.lengths_N, examples_N, borders, grid_SR):
            digest.update(np.ascontiguousarray(array).data)
        identity = {**self._settings(), "digest": digest.hexdigest()}
        return EpochPlan(examples_N, borders, grid_SR, identity)

    def _grid(self, tokens_B: _Ints, rng: np.random.Generator | None) -> _Ints:
        """Return which batch each rank takes at each step, (S, R)."""
        batches, ranks = len(tokens_B), self.num_replicas
        steps = batches // ranks if self.drop_last else -(-batches // ranks)
        if not steps:
            raise MRopeError(
                f"drop_last=True leaves no batch: {len(self.lengths_N)} examples fill {batches} "
                f"batches of {self.max_tokens} tokens, for {ranks} ranks; lower max_tokens, or use "
                "drop_last=False"
            )
        kept = np.argsort(-tokens_B, kind="stable")[: steps * ranks]
        # `resize` begins anew where batches are too few: these are the repeated ones.
        if rng is None:
            return np.resize(np.sort(kept), (steps, ranks))
        return rng.permuted(rng.permutation(np.resize(kept, (steps, ranks))), axis=1)

    def _settings(self) -> dict[str, int | None]:
        """Return what must not change between saving and resuming; the rank may."""
        return {
            "examples": len(self.lengths_N),
            **{name: getattr(self, name) for name in _SETTINGS},
        }


class TokenBudgetIterator(Iterator[list[int]]):
    """One pass over a rank's batches, whose place can be saved.

    The place is kept here and not in the sampler, since a loader with workers draws ahead of the
    batches that it hands out. `torchdata.stateful_dataloader.StatefulDataLoader` asks at the right
    moment; `state_dict` is of the same value on all ranks.
    """

    def __init__(self, sampler: TokenBudgetSampler) -> None:
        self._sampler = sampler
        self._epoch = sampler.epoch
        self._plan: EpochPlan | None = None
        self._yielded = 0

    def __next__(self) -> list[int]:
        plan = self._planned()
        if self._yielded == len(plan.grid_SR):
            raise StopIteration
        self._yielded += 1
        return plan.batch(self._yielded - 1, self._sampler.rank)

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the batches drawn so far, and what they were planned from."""
        return {"epoch": self._epoch, "yielded": self._yielded, **self._planned().identity}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the state was saved, in its epoch, whatever epoch the sampler is set to.

        Raises:
            MRopeError: the state is of other lengths, another seed, number of ranks or other
                argument, under which the remaining batches would not be the same.
        """
        own = self._sampler.plan(_saved(state_dict, "epoch"))
        for name, value in own.identity.items():
            saved = _saved(state_dict, name)
            if saved == value:
                continue
            if name == "digest":
                raise MRopeError(
                    "cannot resume: since the state was saved, the lengths of some examples, or "
                    "their order, changed (or numpy's way of shuffling did, with its release)"
                )
            raise MRopeError(
                f"cannot resume: the state was saved with {name} {saved}, the sampler has {value}; "
                "its batches are not the same"
            )
        yielded = _saved(state_dict, "yielded")
        if not 0 <= yielded <= len(own.grid_SR):
            raise MRopeError(
                f"cannot resume after batch {yielded} of an epoch of {len(own.grid_SR)} batches"
            )
        self._epoch, self._plan, self._yielded = state_dict["epoch"], own, yielded

    def _planned(self) -> EpochPlan:
        if self._plan is None:
            self._plan = self._sampler.plan(self._epoch)
        return self._plan


def _saved(state_dict: Mapping[str, Any], name: str) -> Any:
    if name not in state_dict:
        raise MRopeError(f"not a state of TokenBudgetSampler: it has no {name}")
    return state_dict[name]


def _whole(name: str, value: int, lowest: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, not {type(value).__name__}") from None
    if number < lowest:
        raise ValueError(f"{name} must be at least {lowest}, not {number}")
    return number


def _checked(lengths: Lengths, capacity: int, max_tokens: int) -> _Ints:
    """Return the lengths as an array of its own, if every example fits into a batch."""
    try:
        lengths_N = np.asarray(lengths)
    except ValueError as error:
        raise MRopeError(f"lengths must be one integer for each example: {error}") from error
    if lengths_N.ndim != 1:
        raise MRopeError(f"lengths must be (examples,), not {lengths_N.shape}")
    if not len(lengths_N):
        raise MRopeError("no lengths: a dataset without examples fills no batch")
    if lengths_N.dtype.kind not in "iu":
        values = enumerate(lengths_N.tolist())
        index, value = next((pair for pair in values if type(pair[1]) is not int), (0, lengths[0]))
        raise MRopeError(
            f"lengths must be integers of at most 64 bits, not {lengths_N.dtype}: example {index} "
            f"has {value!r}"
        )
    if lengths_N.min() < 1:
        index = int((lengths_N < 1).argmax())
        raise MRopeError(
            f"example {index} has length {lengths_N[index]}; an example has at least one token"
        )
    if lengths_N.max() > capacity:
        _refuse_long(lengths_N, capacity, max_tokens)
    return lengths_N.astype(np.int64)


def _refuse_long(lengths_N: npt.NDArray[Any], capacity: int, max_tokens: int) -> None:
    long = (lengths_N > capacity).nonzero()[0]
    first = f" (the first of {len(long)} such examples)" if len(long) > 1 else ""
    rounded = "" if capacity == max_tokens else f", which is {capacity} before rounding up"
    raise MRopeError(
        f"example {long[0]} has {lengths_N[long[0]]} tokens, above the budget of "
        f"max_tokens={max_tokens}{rounded}{first}; raise max_tokens, or take such examples out of "
        "the dataset beforehand: the sampler drops nothing silently"
    )
