"""Deal examples into batches of even work within several budgets, without a loop over examples.

Shape suffixes: N examples, B batches, K budgets.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mrope.prepare.binning import first_fit_budgets

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

# Share of the tightest budget that batches are filled to at first.
_FILL = 0.995
# All examples are dealt so many times, each time to more batches, before those without room get
# batches of their own.
_ATTEMPTS = 2
# Examples are dealt for a quarter of the batches at a time: those with the least load.
_PARTS = 4
# Sizes are shrunk by up to this share, at random, before they are sorted. Without it, examples of
# equal rank would meet in every epoch; with more, large examples come last and find no room.
_NOISE = 0.5


def deal_evenly(
    sizes_KN: IntArray,
    capacity_K: IntArray,
    work_N: FloatArray,
    multiple: int,
    rng: np.random.Generator,
) -> IntArray:
    """Assign each example to a batch, so that batches are full, and of similar work.

    Large examples come first, in a random order of roughly falling size. Each part of them goes to
    the batches with the least load, the largest example to the least loaded one. Load is the mean
    of two shares: of the first budget, and of the work of an average batch.

    Args:
        sizes_KN: what each example takes of each budget, 0 to `capacity_K`.
        capacity_K: what a batch holds.
        work_N: work of each example, 0 or more, and not 0 for all.
        multiple: the number of batches is a multiple of this if the examples allow it.
        rng: decides who shares a batch.

    Returns:
        int64 (N,): the batch of each example. No batch is empty or above a budget.
    """
    batches = 0
    batch_N = np.full(sizes_KN.shape[1], -1)
    for _ in range(_ATTEMPTS):
        late = np.flatnonzero(batch_N < 0)
        if not len(late):
            break
        batches += _batches_needed(sizes_KN[:, late], capacity_K)
        batches = -(-batches // multiple) * multiple
        batch_N = _deal(sizes_KN, capacity_K, work_N, batches, rng)
    late = np.flatnonzero(batch_N < 0)
    if len(late):
        batch_N[late] = batches + first_fit_budgets(sizes_KN[:, late], capacity_K)
    # With fewer examples than batches some are empty.
    numbered: IntArray = np.unique(batch_N, return_inverse=True)[1]
    return numbered


def _batches_needed(sizes_KN: IntArray, capacity_K: IntArray) -> int:
    return int(np.ceil((sizes_KN.sum(axis=1) / capacity_K).max() / _FILL))


def _deal(
    sizes_KN: IntArray,
    capacity_K: IntArray,
    work_N: FloatArray,
    batches: int,
    rng: np.random.Generator,
) -> IntArray:
    """Assign examples to a given number of batches; -1 for those that no batch has room for."""
    share_KN = sizes_KN / capacity_K[:, None]
    work_share_N = work_N * (batches / work_N.sum())
    largest_N = np.maximum(share_KN.max(axis=0), work_share_N)
    order_N = np.argsort(-largest_N * rng.uniform(1 - _NOISE, 1, len(work_N)), kind="stable")
    dealt = _Dealt(sizes_KN, capacity_K, (share_KN[0] + work_share_N) / 2, batches)
    part = -(-batches // _PARTS)
    late = [dealt.by_load(order_N[at : at + part]) for at in range(0, len(order_N), part)]
    dealt.by_room(np.concatenate(late))
    return dealt.batch_N


class _Dealt:
    """The batches dealt so far."""

    def __init__(
        self, sizes_KN: IntArray, capacity_K: IntArray, share_N: FloatArray, batches: int
    ) -> None:
        self.sizes_KN, self.share_N = sizes_KN, share_N
        self.room_KB = np.repeat(capacity_K[:, None], batches, axis=1)
        self.load_B = np.zeros(batches)
        self.batch_N = np.full(len(share_N), -1)

    def by_load(self, examples: IntArray) -> IntArray:
        """Place the largest example into the least loaded batch; return those without room."""
        largest = examples[np.argsort(-self.share_N[examples], kind="stable")]
        least = np.argsort(self.load_B, kind="stable")
        return self._place(largest, least)

    def by_room(self, examples: IntArray) -> None:
        """Place the example that takes most of a budget where most of it is left, while any fit."""
        budgets, batches = self.room_KB.shape
        fruitless = 0
        while len(examples) and fruitless < budgets:
            budget = fruitless
            now, later = examples[:batches], examples[batches:]
            largest = now[np.argsort(-self.sizes_KN[budget, now], kind="stable")]
            roomiest = np.argsort(-self.room_KB[budget], kind="stable")
            rest = self._place(largest, roomiest)
            fruitless = fruitless + 1 if len(rest) == len(now) else 0
            examples = np.concatenate((later, rest))

    def _place(self, examples: IntArray, into: IntArray) -> IntArray:
        """Place each example into the batch beside it; return those that have no room there."""
        into = into[: len(examples)]
        sizes = self.sizes_KN[:, examples]
        fits = (sizes <= self.room_KB[:, into]).all(axis=0)
        placed, where = examples[fits], into[fits]
        self.batch_N[placed] = where
        # No batch occurs twice in `into`, so that these assignments do not meet.
        self.room_KB[:, where] -= sizes[:, fits]
        self.load_B[where] += self.share_N[placed]
        return examples[~fits]
