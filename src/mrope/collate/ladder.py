"""`Shapes`: a ladder of fixed shapes, and how one is fitted to the batches of a dataset.

Shape suffixes: N batches or examples, C candidates for rungs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mrope.arrays import IntArray, as_integers
from mrope.errors import MRopeError

# Rungs are chosen among so many quantiles of the batches' sizes.
_CANDIDATES = 96
# Kernels of a graph are fastest at sizes that are multiples of 64. Of small batches that would be
# mostly padding: their rungs are multiples of 8, which tensor cores need.
_MULTIPLES = (8, 16, 32, 64)
# So many multiples make up the largest batch at least, where a multiple above the least is taken.
_STEPS = 128


@dataclass(frozen=True)
class Shapes:
    """A ladder of shapes: `MRopeCollator(shapes=Shapes(...))`; `Shapes.fit` proposes one.

    Plain data: it pickles. A batch takes the first rung that holds it, of each kind; so there are
    `len(tokens) * len(patches)` shapes at most, and as many graphs.

    Args:
        tokens: rungs of a flattened row's tokens, or of a padded batch's width; ascending.
        patches: rungs of a batch's patches, images and clips together; ascending, multiples of the
            patches that share a token. None at all: only tokens are padded, which unmodified models
            take too; pixels and tower tensors keep the shapes of their batch.
        longest: most patches of an image or frame. The attention kernel's grid grows with it.
        patches_per_segment: a rung of P patches has borders for P / this images and frames.
        tokens_per_example: a flattened row of T tokens has borders for T / this examples.
        pad_token_id: token id at what a padded batch is widened by; a flattened row takes the one
            of `Flatten`.

    Raises:
        ValueError: no rungs of tokens, rungs that do not ascend, or a number below 1.
    """

    tokens: Sequence[int]
    patches: Sequence[int] = ()
    longest: int = 4096
    patches_per_segment: int = 64
    tokens_per_example: int = 256
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "patches"):
            rungs = tuple(getattr(self, name))
            whole = all(isinstance(rung, int) and not isinstance(rung, bool) for rung in rungs)
            ascending = whole and list(rungs) == sorted(set(rungs)) and min(rungs, default=1) >= 1
            if not ascending or (name == "tokens" and not rungs):
                raise ValueError(f"shapes: {name} must be ascending integers, not {rungs}")
            object.__setattr__(self, name, rungs)
        for name in ("longest", "patches_per_segment", "tokens_per_example"):
            if getattr(self, name) < 1:
                raise ValueError(f"shapes: {name} must be at least 1, not {getattr(self, name)}")

    def borders(self, patches: int) -> int:
        """Return how many images and frames a rung of patches has borders for."""
        # Padding takes segments too, each no longer than `longest`.
        return -(-patches // self.patches_per_segment) + -(-patches // self.longest)

    def examples(self, tokens: int) -> int:
        """Return how many examples a flattened row of a rung of tokens has borders for."""
        return -(-tokens // self.tokens_per_example) + 1

    def sampler_lengths(
        self, tokens: npt.ArrayLike, patches: npt.ArrayLike
    ) -> npt.NDArray[np.int64]:
        """Return lengths for a `TokenBudgetSampler` whose batches stay below both top rungs.

        With `max_tokens` of the top rung of tokens, or less, examples whose lengths fit into one
        batch have no more tokens than `max_tokens`, and no more patches than the top rung: an
        example with a larger share of the patches than of the tokens counts by its patches.

        Args:
            tokens, patches: (N,) of each example; `mrope_length` and `mrope_patches` of `Precheck`.

        Returns:
            int64 (N,), at least `tokens`.

        Example:
            >>> Shapes(tokens=(4096,), patches=(8192,)).sampler_lengths([1024, 1024], [512, 4096])
            array([1024, 2048])
        """
        token_N = as_integers("tokens", tokens, "one of each example").astype(np.int64)
        if not self.patches:
            return token_N
        patch_N = as_integers("patches", patches, "one of each example").astype(np.int64)
        by_patches = -(-patch_N * self.tokens[-1] // self.patches[-1])
        lengths_N: npt.NDArray[np.int64] = np.maximum(token_N, by_patches)
        return lengths_N

    @classmethod
    def fit(
        cls,
        tokens: npt.ArrayLike,
        patches: npt.ArrayLike,
        segments: npt.ArrayLike,
        longest: int,
        *,
        examples: npt.ArrayLike | None = None,
        graphs: int = 8,
    ) -> Ladder:
        """Choose rungs for batches of these sizes, with the least padding.

        Args:
            tokens: (N,) tokens of each batch: of its flattened row, or of its longest row.
            patches: (N,) patches of each batch, images and clips together; 0 for text alone.
            segments: (N,) images and frames of each batch.
            longest: most patches of an image or frame in the dataset.
            examples: (N,) examples of each flattened batch; None: padded batches, which have no
                borders between examples.
            graphs: most pairs of rungs, each of which compiles once.

        Returns:
            Rungs of tokens and of patches, at most `graphs` pairs. Borders are for the batches
            with the most images and frames, and the most examples, for their rungs.

        Raises:
            MRopeError: no batches, arrays of different lengths, or sizes below 0.

        Example:
            >>> ladder = Shapes.fit([4096] * 4, [512, 512, 2048, 2048], [2, 2, 8, 8], 256, graphs=2)
            >>> ladder.shapes.tokens, ladder.shapes.patches, ladder.graphs
            ((4096,), (512, 2048), 2)
        """
        sizes = {"tokens": tokens, "patches": patches, "segments": segments}
        sizes["examples"] = np.zeros(np.shape(tokens), np.int64) if examples is None else examples
        token_N, patch_N, segment_N, example_N = _sizes(sizes)
        token_rungs, patch_rungs = _best_rungs(token_N, patch_N, graphs)
        token_rung_N = token_rungs[token_rungs.searchsorted(token_N)]
        patch_rung_N = patch_rungs[patch_rungs.searchsorted(patch_N)]
        borders = {"patches_per_segment": _share(patch_rung_N, segment_N)}
        if examples is not None:
            borders["tokens_per_example"] = _share(token_rung_N, example_N)
        pairs = {*zip(token_rung_N.tolist(), patch_rung_N.tolist(), strict=True)}
        return Ladder(
            cls(token_rungs.tolist(), patch_rungs.tolist(), longest, **borders),
            _padding(token_N, token_rungs),
            _padding(patch_N, patch_rungs),
            len(pairs),
        )


class Ladder(NamedTuple):
    """A proposed ladder, and what it costs.

    Attributes:
        shapes: for `MRopeCollator(shapes=...)`.
        token_padding, patch_padding: share of all tokens, and of all patches, that are padding. Of
            padded batches only what is added to their width counts, not what fills up short rows.
        graphs: pairs of rungs that the batches use.
    """

    shapes: Shapes
    token_padding: float
    patch_padding: float
    graphs: int


def choose_rung(
    name: str,
    rungs: Sequence[int],
    needed: int,
    per_row: Sequence[int],
    has_borders: Callable[[int], bool] = bool,
) -> int:
    """Return the first rung that holds `needed` and has borders enough.

    Args:
        name: "tokens" or "patches", for the message.
        per_row: what each row of the batch needs, for the message.
        has_borders: whether a rung has borders for the batch. If none has, the top rung is returned
            all the same: whoever sets the borders says how many are too many.

    Raises:
        MRopeError: the batch is above the top rung.
    """
    holding = [rung for rung in rungs if needed <= rung]
    if holding:
        return next((rung for rung in holding if has_borders(rung)), holding[-1])
    heaviest = sorted(range(len(per_row)), key=lambda row: -per_row[row])[:3]
    listed = ", ".join(f"row {row} with {per_row[row]}" for row in heaviest)
    raise MRopeError(
        f"the batch has {needed} {name}, above the top rung {rungs[-1]} of shapes.{name}; the "
        f"largest: {listed}. Give a higher rung, or let the sampler make smaller batches: "
        f"TokenBudgetSampler(shapes.sampler_lengths(tokens, patches), max_tokens=...) keeps them "
        f"below both top rungs"
    )


def _sizes(given: dict[str, npt.ArrayLike]) -> list[IntArray]:
    arrays: list[IntArray] = [
        as_integers(name, values, "one of each batch").astype(np.int64)
        for name, values in given.items()
    ]
    if not arrays[0].size or len({array.shape for array in arrays}) > 1:
        raise MRopeError("a ladder needs tokens, patches and segments of the same batches")
    if min(array.min() for array in arrays) < 0:
        raise MRopeError("a ladder needs sizes of 0 and more")
    return arrays


def _best_rungs(token_N: IntArray, patch_N: IntArray, graphs: int) -> tuple[IntArray, IntArray]:
    """Divide `graphs` between rungs of tokens and of patches, with the least padding of both."""
    best: tuple[float, IntArray, IntArray] | None = None
    for count in range(1, graphs + 1):
        # Text alone takes the lowest rung of patches whole; it is padding like any other.
        token_rungs, patch_rungs = _rungs(token_N, count), _rungs(patch_N, graphs // count)
        cost = _padding(token_N, token_rungs) + _padding(patch_N, patch_rungs)
        if best is None or cost < best[0]:
            best = cost, token_rungs, patch_rungs
    if best is None:
        raise MRopeError(f"a ladder needs at least 1 graph, not {graphs}")
    return best[1:]


def _share(rung_N: IntArray, count_N: IntArray) -> int:
    """Return the most tokens or patches for each border with which every batch has enough."""
    return max(1, int((rung_N // np.maximum(count_N, 1)).min()))


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
    fine = [one for one in _MULTIPLES if one * _STEPS <= int(size_N.max())]
    multiple = max(fine, default=_MULTIPLES[0])
    rounded_C = -(-quantiles.astype(np.int64) // multiple) * multiple
    candidate_C = np.unique(rounded_C.clip(multiple))
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
