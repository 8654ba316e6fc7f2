"""Plan the batches of an epoch for all ranks.

Shape suffixes: N examples, B batches of all ranks, S steps of an epoch, R ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mrope.prepare.binning import first_fit, first_fit_budgets, split_largest
from mrope.prepare.budgets import Budget
from mrope.prepare.dealing import deal_evenly

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]
_Rng = np.random.Generator | None


@dataclass(frozen=True)
class EpochPlan:
    """Hold the batches of one epoch for all ranks.

    Attributes:
        examples_N: int64 (N,), indices of the examples, batch after batch.
        borders: int64 (B + 1,), where each batch begins and ends in `examples_N`.
        grid_SR: int64 (S, R), the batch that each rank takes at each step.
        digest: of what the batches follow from, and of the batches.
    """

    examples_N: _Ints
    borders: _Ints
    grid_SR: _Ints
    digest: str

    def batch(self, step: int, rank: int) -> list[int]:
        """Return the indices of the examples that `rank` takes at `step`."""
        # Lists of ints: the indices go through pipes to workers, and to any `__getitem__`.
        number = self.grid_SR[step, rank]
        start, stop = self.borders[number : number + 2]
        examples: list[int] = self.examples_N[start:stop].tolist()
        return examples

    def left(self, steps: int) -> _Ints:
        """Return the examples that no rank has taken after so many steps, int64, ascending."""
        left_B = np.ones(len(self.borders) - 1, bool)
        left_B[self.grid_SR[:steps]] = False
        return np.sort(self.examples_N[left_B.repeat(np.diff(self.borders))])


@dataclass(frozen=True)
class Planner:
    """Fill examples into batches, and give ranks batches of similar work at each step.

    Attributes:
        budgets: what a batch may hold, by kind; that of tokens first.
        work_N: float64 (N,), work of each example; None: its tokens.
        drop_last: drop batches that ranks cannot share evenly, else split others.
    """

    budgets: Mapping[str, Budget]
    work_N: _Floats | None
    drop_last: bool

    def plan(self, left_N: _Ints, ranks: int, rng: _Rng) -> EpochPlan:
        """Return the plan of some examples.

        Args:
            left_N: int64, indices of the examples, ascending.
            ranks: the number of ranks.
            rng: of the order; None: as given.
        """
        order_N = left_N if rng is None else rng.permutation(left_N)
        # After the last step of earlier ranks nothing is left to fill a batch with.
        batch_N = self._fill(order_N, ranks, rng) if len(order_N) else order_N
        # Stable, so that examples keep their order within a batch, and all platforms agree.
        examples_N = order_N[np.argsort(batch_N, kind="stable")]
        tokens_N = self.budgets["tokens"].sizes_N[examples_N]
        borders = np.concatenate(([0], np.bincount(batch_N).cumsum()))
        if not self.drop_last:
            borders = split_largest(tokens_N, borders, (1 - len(borders)) % ranks)
        tokens_B = np.add.reduceat(tokens_N, borders[:-1])
        if self.work_N is None:
            work_B = tokens_B.astype(np.float64)
        else:
            work_B = np.add.reduceat(self.work_N[examples_N], borders[:-1])
        grid_SR = self._grid(tokens_B, work_B, ranks, rng)
        return EpochPlan(examples_N, borders, grid_SR, self._digest(examples_N, borders, grid_SR))

    def _fill(self, order_N: _Ints, ranks: int, rng: _Rng) -> _Ints:
        """Return the batch of each example, int64 (N,), in the order given."""
        budgets = self.budgets
        if self.work_N is None and not budgets.keys() - {"tokens", "examples"}:
            tokens, most = budgets["tokens"], budgets.get("examples")
            most_examples = None if most is None else most.capacity
            return first_fit(tokens.sizes_N[order_N], tokens.capacity, most_examples)
        sizes_KN = np.stack([budget.sizes_N[order_N] for budget in budgets.values()])
        capacity_K = np.array([budget.capacity for budget in budgets.values()])
        if rng is None:
            return first_fit_budgets(sizes_KN, capacity_K)
        work_N = sizes_KN[0].astype(np.float64)
        # Examples that are left of an epoch may have no work at all.
        if self.work_N is not None and self.work_N[order_N].any():
            work_N = self.work_N[order_N]
        return deal_evenly(sizes_KN, capacity_K, work_N, 1 if self.drop_last else ranks, rng)

    def _grid(self, tokens_B: _Ints, work_B: _Floats, ranks: int, rng: _Rng) -> _Ints:
        """Return the batch that each rank takes at each step, int64 (S, R)."""
        batches = len(tokens_B)
        steps = batches // ranks if self.drop_last else -(-batches // ranks)
        kept = np.argsort(-tokens_B, kind="stable")[: steps * ranks]
        # Neighbours in this order have similar work, and share a step.
        kept = kept[np.argsort(-work_B[kept], kind="stable")]
        # `resize` repeats batches from the first on if there are too few.
        if rng is None:
            return np.resize(np.sort(kept), (steps, ranks))
        return rng.permuted(rng.permutation(np.resize(kept, (steps, ranks))), axis=1)

    def _digest(self, *plan: _Ints) -> str:
        digest = hashlib.blake2b(digest_size=16)
        columns = [budget.sizes_N for kind, budget in self.budgets.items() if kind != "examples"]
        work = [] if self.work_N is None else [self.work_N]
        for array in (*columns, *work, *plan):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()
