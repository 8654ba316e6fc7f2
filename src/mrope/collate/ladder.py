"""Propose a ladder of shapes for the batches of a dataset: few rungs, little padding."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mrope.arrays import IntArray, as_integers
from mrope.collate.shapes import Shapes
from mrope.errors import MRopeError

# Rungs are chosen among so many quantiles of the batches' sizes.
_CANDIDATES = 96
# Kernels of a graph are fastest at sizes that are multiples of this.
_MULTIPLE = 64


class Ladder(NamedTuple):
    """A proposed ladder, and what it costs.

    Attributes:
        shapes: for `MRopeCollator(shapes=...)`.
        token_padding, patch_padding: share of all tokens, and of all patches, that are padding.
        graphs: pairs of rungs that the batches use.
    """

    shapes: Shapes
    token_padding: float
    patch_padding: float
    graphs: int


def fit_ladder(
    tokens: npt.ArrayLike,
    patches: npt.ArrayLike,
    segments: npt.ArrayLike,
    longest: int,
    graphs: int = 8,
) -> Ladder:
    """Choose rungs for batches of these sizes, with the least padding.

    Args:
        tokens: (N,) tokens of each batch: of its flattened row, or of its longest row.
        patches: (N,) patches of each batch, images and clips together; 0 for text alone.
        segments: (N,) images and frames of each batch.
        longest: most patches of an image or frame in the dataset.
        graphs: most pairs of rungs, each of which compiles once.

    Returns:
        Rungs of tokens and of patches, as many as share `graphs` with the least padding. Borders
        are for the batch with the most segments for its patches.

    Raises:
        MRopeError: no batches, arrays of different lengths, or sizes below 0.

    Example:
        >>> ladder = fit_ladder([4096] * 4, [512, 512, 2048, 2048], [2, 2, 8, 8], 256, graphs=2)
        >>> ladder.shapes.tokens, ladder.shapes.patches, ladder.graphs
        ((4096,), (512, 2048), 2)
    """
    named = {"tokens": tokens, "patches": patches, "segments": segments}
    token_N, patch_N, segment_N = (
        as_integers(name, values, "one of each batch") for name, values in named.items()
    )
    if not len(token_N) or len({one.shape for one in (token_N, patch_N, segment_N)}) > 1:
        raise MRopeError("a ladder needs tokens, patches and segments of the same batches")
    if min(token_N.min(), patch_N.min(), segment_N.min()) < 0:
        raise MRopeError("a ladder needs sizes of 0 and more")
    best: tuple[float, IntArray, IntArray] | None = None
    for count in range(1, graphs + 1):
        # Text alone takes the lowest rung of patches whole; it is padding like any other.
        token_rungs, patch_rungs = _rungs(token_N, count), _rungs(patch_N, graphs // count)
        cost = _padding(token_N, token_rungs) + _padding(patch_N, patch_rungs)
        if best is None or cost < best[0]:
            best = cost, token_rungs, patch_rungs
    assert best is not None  # graphs is at least 1
    _, token_rungs, patch_rungs = best
    chosen = token_rungs.searchsorted(token_N), patch_rungs.searchsorted(patch_N)
    rung_N = patch_rungs[chosen[1]]
    per_segment = max(1, int((rung_N // np.maximum(segment_N, 1)).min()))
    shapes = Shapes(
        tokens=token_rungs.tolist(),
        patches=patch_rungs.tolist(),
        longest=longest,
        patches_per_segment=per_segment,
    )
    return Ladder(
        shapes,
        _padding(token_N, token_rungs),
        _padding(patch_N, patch_rungs),
        len(set(zip(*(one.tolist() for one in chosen), strict=True))),
    )


def _padding(size_N: IntArray, rungs: IntArray) -> float:
    """Return the share of padding if every batch takes the first rung that holds it."""
    rung_N = rungs[rungs.searchsorted(size_N)]
    return float(1 - size_N.sum() / rung_N.sum())


def _rungs(size_N: IntArray, count: int) -> IntArray:
    """Choose at most `count` rungs with the least padding, by dynamic programming.

    Of candidates c_0 < c_1 < ..., the last is always a rung. With rungs at i < j, the batches
    between take c_j; the cost of that is known, and so the best way to each j with k rungs.
    """
    quantiles = np.quantile(size_N, np.linspace(0, 1, _CANDIDATES), method="higher")
    candidate_C = np.unique(-(-quantiles.astype(np.int64) // _MULTIPLE) * _MULTIPLE).clip(_MULTIPLE)
    candidate_C = np.unique(candidate_C)
    # Batches up to each candidate: the first border is 0.
    upto_C1 = np.append(0, np.sort(size_N).searchsorted(candidate_C, side="right"))
    cost_C = candidate_C * upto_C1[1:]  # with one rung
    before = [np.full(len(candidate_C), -1)]
    for _ in range(1, min(count, len(candidate_C))):
        # cost of rungs at i then j: what i costs, and the batches between at c_j.
        step_CC = cost_C[:, None] + candidate_C * (upto_C1[1:] - upto_C1[1:, None])
        step_CC[np.tril_indices(len(candidate_C))] = np.iinfo(np.int64).max
        before.append(np.where(step_CC.min(axis=0) < cost_C, step_CC.argmin(axis=0), before[-1]))
        cost_C = np.minimum(cost_C, step_CC.min(axis=0))
    chosen = [len(candidate_C) - 1]
    while len(before) > 1 and before[-1][chosen[-1]] >= 0:
        chosen.append(int(before.pop()[chosen[-1]]))
    rungs: IntArray = candidate_C[chosen[::-1]]
    return rungs
