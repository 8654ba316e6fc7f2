"""Choose the samples of one batch from a buffer: some in order, then the best fit for the rest.

Shape suffixes: B samples in the buffer; the axis of 2 is tokens and patches.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def choose(
    sizes_B2: IntArray, budget_2: IntArray, max_examples: int | None, order_B: IntArray
) -> IntArray:
    """Return the places of the samples that make the next batch, ascending.

    Samples are taken in `order_B` up to the first that does not fit; then, one after another, the
    largest that fits into what is left of both budgets. The first sample of the order is always
    taken.

    Args:
        sizes_B2: int64 (B, 2), tokens and patches of each sample, each within the budgets; B >= 1.
        budget_2: int64 (2,), tokens and patches of a batch.
        max_examples: maximum number of samples in a batch; None: no limit.
        order_B: int64 (B,), a permutation of the places.

    Example: a budget of 10 tokens; in order 4, 3, 6, 1 and 2 tokens. 4 and 3 are taken, 6 does not
    fit into the 3 that are left, and 2 fits best; then 1.

        >>> sizes = np.array([[4, 0], [3, 0], [6, 0], [1, 0], [2, 0]])
        >>> choose(sizes, np.array([10, 0]), None, np.arange(5)).tolist()
        [0, 1, 3, 4]
    """
    most = len(sizes_B2) if max_examples is None else max_examples
    sums_B2 = sizes_B2[order_B].cumsum(axis=0)
    # Sizes are not negative, so that the samples up to the first misfit are those whose sums fit.
    leading = min(int((sums_B2 <= budget_2).all(axis=1).sum()), most)
    chosen = order_B[:leading].tolist()
    room_2 = budget_2 - sums_B2[leading - 1]
    # In shares of the budgets: a patch and a token are not alike.
    share_B = (sizes_B2 / np.maximum(budget_2, 1)).sum(axis=1)
    free_B = np.ones(len(sizes_B2), bool)
    free_B[chosen] = False
    while len(chosen) < most:
        fits_B = free_B & (sizes_B2 <= room_2).all(axis=1)
        if not fits_B.any():
            break
        # The first of equals, which has been in the buffer the longest.
        place = int(np.where(fits_B, share_B, -1.0).argmax())
        chosen.append(place)
        free_B[place] = False
        room_2 = room_2 - sizes_B2[place]
    return np.sort(np.array(chosen, np.int64))
