"""Sample batches up to a token budget, for `torch.utils.data.DataLoader(batch_sampler=...)`.

First-fit places the examples in shuffled order, so that each batch is a random mixture of lengths.
In the order of length it would need slightly fewer batches, and every batch would hold examples of
about one length.

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

# What a saved position depends on. The rank is absent: any rank can resume from any rank's state.
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
    """Hold the batches of one epoch for all ranks.

    Attributes:
        examples_N: int64 (N,), indices of the examples, batch after batch.
        borders: int64 (B + 1,), where each batch begins and ends in `examples_N`.
        grid_SR: int64 (S, R), the batch that each rank takes at each step.
        identity: the sampler's settings, and a digest of lengths and batches; plain values.
    """

    examples_N: _Ints
    borders: _Ints
    grid_SR: _Ints
    identity: Mapping[str, int | str | None]

    def batch(self, step: int, rank: int) -> list[int]:
        """Return the indices of the examples that `rank` takes at `step`."""
        # Lists of ints: the indices go through pipes to workers, and to any `__getitem__`.
        number = self.grid_SR[step, rank]
        start, stop = self.borders[number : number + 2]
        examples: list[int] = self.examples_N[start:stop].tolist()
        return examples


class TokenBudgetSampler(Sampler[list[int]]):
    """Fill batches with examples up to a token budget, first-fit, evenly over ranks.

    An example goes into the first batch that has room for it, see `first_fit`. The plan of an epoch
    depends only on the arguments and the epoch: all ranks compute the same one, without
    communication.

    Args:
        lengths: (N,) tokens of each example, placeholders of images and videos included.
        max_tokens: maximum number of tokens in a batch, after rounding up.
        max_examples: maximum number of examples in a batch; None: no limit.
        pad_to_multiple_of: the collator's value: a flattened row is padded to a multiple of it.
        shuffle: take the examples in random order, a different one in each epoch; see `set_epoch`.
            False: in the order of the dataset, and batches in the order of their first examples.
        seed: seed of the random order; the same on all ranks.
        drop_last: what to do if the number of batches is not a multiple of the ranks. False: split
            batches in two, the one with the most tokens first, until it is; repeat some only if
            every batch is down to one example. True: drop the surplus batches with the fewest
            tokens. With one rank neither happens.
        rank, num_replicas: default to those of torch.distributed if it is initialised, else 0 and
            1.

    With `shuffle`, the batches of one step have similar token counts: batches are sorted by tokens
    and grouped into steps; then the steps, and the ranks within each step, are shuffled. Without
    it, a step takes the next batches in order.

    Raises:
        TypeError: an argument that must be an int is not.
        ValueError: an argument is out of range.
        MRopeError: there are no lengths, one is not an integer above 0, or an example does not fit
            into an empty batch.

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
        # A row is padded up to a multiple, which must not exceed max_tokens.
        self.capacity = self.max_tokens // self.pad_to_multiple_of * self.pad_to_multiple_of
        if not self.capacity:
            raise ValueError(
                f"max_tokens {max_tokens} is below pad_to_multiple_of {pad_to_multiple_of}"
            )
        self.lengths_N = _checked(lengths, self.capacity, self.max_tokens)
        self.epoch = 0
        self._made: tuple[int, EpochPlan] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, and so the order, of later iterators, as in `DistributedSampler`."""
        self.epoch = _whole("epoch", epoch, 0)

    def __len__(self) -> int:
        """Return the number of batches of a rank in the epoch set; it may differ between epochs."""
        return len(self.plan(self.epoch).grid_SR)

    def __iter__(self) -> TokenBudgetIterator:
        return TokenBudgetIterator(self)

    def plan(self, epoch: int) -> EpochPlan:
        """Compute the batches of all ranks in an epoch; the last plan is cached.

        Raises:
            MRopeError: `drop_last` leaves no batch at all.
        """
        if self._made is None or self._made[0] != epoch:
            self._made = epoch, self._make(epoch)
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
            "and its caller (such as accelerate's prepare) would shard them again, which loses "
            "most examples; use accelerate.data_loader.prepare_data_loader(loader, "
            "num_processes=1, process_index=0), or do not prepare the loader"
        )

    def _make(self, epoch: int) -> EpochPlan:
        # Seed and epoch as a pair: as a sum, epoch 1 of seed 0 would equal epoch 0 of seed 1.
        rng = np.random.default_rng((self.seed, epoch)) if self.shuffle else None
        examples = len(self.lengths_N)
        order_N = np.arange(examples) if rng is None else rng.permutation(examples)
        batch_N = first_fit(self.lengths_N[order_N], self.capacity, self.max_examples)
        # Stable, so that examples keep their order within a batch, and all platforms agree.
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
        """Return the batch that each rank takes at each step, int64 (S, R)."""
        batches, ranks = len(tokens_B), self.num_replicas
        steps = batches // ranks if self.drop_last else -(-batches // ranks)
        if not steps:
            raise MRopeError(
                f"drop_last=True leaves no batch: {len(self.lengths_N)} examples fill {batches} "
                f"batches of {self.max_tokens} tokens, for {ranks} ranks; lower max_tokens, or use "
                "drop_last=False"
            )
        # Neighbours in this order have similar token counts, and share a step.
        kept = np.argsort(-tokens_B, kind="stable")[: steps * ranks]
        # `resize` repeats batches from the first on if there are too few.
        if rng is None:
            return np.resize(np.sort(kept), (steps, ranks))
        return rng.permuted(rng.permutation(np.resize(kept, (steps, ranks))), axis=1)

    def _settings(self) -> dict[str, int | None]:
        """Return the settings that must be equal when resuming; the rank may change."""
        return {
            "examples": len(self.lengths_N),
            **{name: getattr(self, name) for name in _SETTINGS},
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
        self._plan: EpochPlan | None = None
        self._yielded = 0

    def __next__(self) -> list[int]:
        plan = self._planned()
        if self._yielded == len(plan.grid_SR):
            raise StopIteration
        self._yielded += 1
        return plan.batch(self._yielded - 1, self._sampler.rank)

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the number of batches drawn, and the plan's identity."""
        return {"epoch": self._epoch, "yielded": self._yielded, **self._planned().identity}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved position, in its epoch, regardless of the sampler's epoch.

        Raises:
            MRopeError: the state has other lengths, another seed, another number of ranks or
                another setting, with which the remaining batches would differ.
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
        # Not at construction: a loader calls `iter` before it restores a state of another epoch.
        if self._plan is None:
            self._plan = self._sampler.plan(self._epoch)
        return self._plan


def _saved(state_dict: Mapping[str, Any], name: str) -> Any:
    if name not in state_dict:
        raise MRopeError(f"not a state of TokenBudgetSampler: it has no {name}")
    return state_dict[name]


def _whole(name: str, value: int, lowest: int) -> int:
    try:
        # numpy's integers pass, floats such as 2.0 do not.
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, not {type(value).__name__}") from None
    if number < lowest:
        raise ValueError(f"{name} must be at least {lowest}, not {number}")
    return number


def _checked(lengths: Lengths, capacity: int, max_tokens: int) -> _Ints:
    """Return a copy of the lengths, int64 (N,), if every example fits into a batch."""
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
        f"max_tokens={max_tokens}{rounded}{first}; raise max_tokens, or remove such examples from "
        "the dataset: the sampler does not drop any"
    )
