"""How a token budget is filled: exact first-fit, and batches cut until their number is even.

Shape suffixes: N examples, B batches.
"""

from __future__ import annotations

import heapq
from itertools import pairwise

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def first_fit(lengths_N: IntArray, capacity: int, max_examples: int | None = None) -> IntArray:
    """Return for each example the number of its batch: the first with room for it.

    Args:
        lengths_N: tokens of each example, in the order in which they are placed; 1 to `capacity`.
        capacity: tokens of a batch.
        max_examples: examples of a batch; None: no bound.

    Returns:
        int64 (N,). Batches are numbered from 0, in the order of their first examples.

    A binary tree over the batches finds the first one with room in log2(batches) steps: each node
    holds the most room that a batch below it has. From the root it goes to the left child if
    that one has enough room, and to the right one otherwise. A batch that nobody uses yet has all
    its room, so that the root never says no.

    Example: capacity 10; 6, 5 and 3 are placed, and 4 comes

                 10
              5      10        1 < 4 <= 5: batch 1, which has 1 left. Its parent has 1 then,
             1 5   10  10      the root keeps 10. A 2 goes right now, to batch 2.
    """
    total, examples = int(lengths_N.sum()), len(lengths_N)
    # Two batches that are not full by number have more than `capacity` between them: what began the
    # later one had no room in the earlier one.
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
        left = room[node] = room[node] - length if places[batch] else 0
        while node > 1:
            left = max(left, room[node ^ 1])
            node //= 2
            if room[node] == left:
                break
            room[node] = left
    return batch_N


def split_largest(tokens_N: IntArray, borders: IntArray, cuts: int) -> IntArray:
    """Return the borders with up to `cuts` more, each in the middle of the batch of most tokens.

    Fewer are added only if no batch with two examples is left.
    """
    ends = np.concatenate(([0], tokens_N.cumsum()))
    batches = [
        (-int(ends[stop] - ends[start]), start, stop)
        for start, stop in pairwise(borders.tolist() if cuts else ())
        if stop - start > 1
    ]
    heapq.heapify(batches)
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
