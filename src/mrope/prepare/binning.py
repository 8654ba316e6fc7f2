"""Assign examples to batches by first-fit, and split batches until ranks share them evenly.

Shape suffixes: N examples, B batches, K budgets.
"""

from __future__ import annotations

import heapq
from itertools import pairwise

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

# Batches that `first_fit_budgets` looks at for an example.
_OPEN = 512


def first_fit(lengths_N: IntArray, capacity: int, max_examples: int | None = None) -> IntArray:
    """Assign each example to the first batch that has room for it.

    Args:
        lengths_N: tokens of each example, 1 to `capacity`, in the order in which they are placed.
        capacity: tokens of a batch.
        max_examples: maximum number of examples in a batch; None: no limit.

    Returns:
        int64 (N,): the batch of each example. Batches are numbered from 0, in the order of their
        first examples.

    A binary tree over the batches finds the first one with room in log2(batches) steps. Each node
    holds the largest room of the batches below it. The search starts at the root, and goes to the
    left child if that has enough room, otherwise to the right one. Unused batches have all their
    room, so that the root always has enough.

    Example: capacity 10; 6, 5 and 3 are placed, and 4 is next

                 10
              5      10        1 < 4 <= 5: batch 1, which has 1 left. Its parent then has 1,
             1 5   10  10      and the root keeps 10. A 2 after it goes right, to batch 2.
    """
    total, examples = int(lengths_N.sum()), len(lengths_N)
    # Of two batches that are not full by number, the first example of the later one had no room in
    # the earlier one: together they hold more than `capacity`.
    most = 2 * (total // capacity + 1) + (examples // max_examples if max_examples else 0)
    leaves = 1 << (min(examples, most) - 1).bit_length()
    room = [capacity] * (2 * leaves)  # children of node i: 2 * i and 2 * i + 1
    places = [max_examples or examples] * leaves
    batch_N = np.empty(examples, np.int64)
    for index, length in enumerate(lengths_N.tolist()):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        batch = node - leaves
        batch_N[index] = batch
        places[batch] -= 1
        # A batch that is full by number has no room for any length.
        left = room[node] = room[node] - length if places[batch] else 0
        while node > 1:
            left = max(left, room[node ^ 1])
            node //= 2
            if room[node] == left:
                break  # the nodes above do not change either
            room[node] = left
    return batch_N


def first_fit_budgets(sizes_KN: IntArray, capacity_K: IntArray) -> IntArray:
    """Assign each example to the first of the newest batches that has room in every budget.

    Only the newest `_OPEN` batches are looked at, so that a million examples take seconds.

    Args:
        sizes_KN: what each example takes of each budget, 0 to `capacity_K`, in the order in which
            they are placed.
        capacity_K: what a batch holds.

    Returns:
        int64 (N,): the batch of each example, numbered as by `first_fit`.
    """
    budgets, examples = sizes_KN.shape
    room_KB = np.repeat(capacity_K[:, None], min(2 * _OPEN, examples), axis=1)
    batch_N = np.empty(examples, np.int64)
    used = closed = 0  # batches in use among those in `room_KB`, and before them
    for index, size_K in enumerate(sizes_KN.T):
        if used == room_KB.shape[1]:
            room_KB[:, :_OPEN] = room_KB[:, -_OPEN:]
            room_KB[:, _OPEN:] = capacity_K[:, None]
            used, closed = _OPEN, closed + room_KB.shape[1] - _OPEN
        start = max(0, used - _OPEN)
        # One more than those in use is empty, and has room.
        fits = room_KB[0, start : used + 1] >= size_K[0]
        for budget in range(1, budgets):
            fits &= room_KB[budget, start : used + 1] >= size_K[budget]
        batch = start + int(fits.argmax())
        used = max(used, batch + 1)
        room_KB[:, batch] -= size_K
        batch_N[index] = closed + batch
    return batch_N


def split_largest(tokens_N: IntArray, borders: IntArray, cuts: int) -> IntArray:
    """Split batches in two, `cuts` times, each time the one with the most tokens near its middle.

    Args:
        tokens_N: tokens of each example, batch after batch.
        borders: int64 (B + 1,), where each batch begins and ends among the examples.
        cuts: number of splits; fewer are made only if every batch is down to one example.

    Returns:
        int64, the borders with those of the splits, sorted.
    """
    ends = np.concatenate(([0], tokens_N.cumsum()))
    batches = [
        (-int(ends[stop] - ends[start]), start, stop)
        for start, stop in pairwise(borders.tolist() if cuts else ())
        if stop - start > 1
    ]
    heapq.heapify(batches)  # a min-heap: tokens are negated
    added: list[int] = []
    while batches and len(added) < cuts:
        _, start, stop = heapq.heappop(batches)
        uneven = abs(2 * ends[start + 1 : stop] - ends[start] - ends[stop])
        cut = start + 1 + int(uneven.argmin())
        added.append(cut)
        for first, last in ((start, cut), (cut, stop)):
            if last - first > 1:
                heapq.heappush(batches, (-int(ends[last] - ends[first]), first, last))
    return np.sort(np.concatenate((borders, np.array(added, np.int64))))
