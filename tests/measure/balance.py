"""Simulate how evenly batches load the ranks of a training run: `python -m measure balance`.

Four ways to fill and share out batches of 16,384 tokens from the same examples (`measure.mix`):

- tokens only: `TokenBudgetSampler(lengths, max_tokens)`;
- length-sorted: batches filled one after another from examples sorted by length;
- visual tokens: first-fit in order of falling length, then batches of similar numbers of visual
  tokens share a step, as NeMo Automodel's `greedy_knapsack_vt_balanced` orders its packs;
- work: `TokenBudgetSampler` with `cost=WorkModel`.

All use every example once: as many of the largest batches are split as whole steps need. Work is
that of `WorkModel`; no model runs.

Imbalance is the slowest rank's work over the mean of the ranks, each summed over the steps: how
many times longer they take than with evenly shared work. Under DDP ranks meet once a step: `total`.
Under FSDP they meet at every layer, so that in the worst case all are blocked by the slowest tower,
and then by the slowest text model: `in turn`.

Shape suffixes: N examples, B batches, S steps, R ranks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from measure.mix import FULL_BUDGET, Mix, make_mix
from mrope.bench.harness import conditions, make_console, make_table, one_line, write_json
from mrope.prepare.binning import first_fit, split_largest
from mrope.prepare.sampler import TokenBudgetSampler
from mrope.prepare.work import WorkModel

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

RANKS = (8, 64, 512)
PLANNED = 1_000_000
# A batch of placeholders alone has four patches a token; this binds in batches of little text.
_MAX_PATCHES = 3.5
# `WorkModel.from_config` of Qwen3-VL-2B, whose config is not part of the package.
QWEN3_VL_2B = WorkModel(
    per_token=10_322_706_432,
    per_token_pair=688_128,
    per_patch=1_969_225_728,
    per_patch_pair=294_912,
)


@dataclass(frozen=True)
class Counts:
    """What examples take of a batch, and their work, all (N,)."""

    tokens_N: IntArray
    visual_N: IntArray
    patches_N: IntArray
    pairs_N: IntArray
    text_N: FloatArray
    tower_N: FloatArray

    @classmethod
    def of(cls, mix: Mix, work: WorkModel) -> Counts:
        """Count a mix."""
        tokens, patches, pairs = mix.tokens(), mix.patches(), mix.patch_pairs()
        tower = work.tower(patches, pairs)
        return cls(tokens, mix.visual_tokens(), patches, pairs, work.text(tokens), tower)


@dataclass(frozen=True)
class Steps:
    """The batches of an epoch.

    Attributes:
        examples_N: int64 (N,), examples, batch after batch.
        borders: int64 (B + 1,), where each batch begins and ends in `examples_N`.
        grid_SR: int64 (S, R), the batch of each step and rank.
    """

    examples_N: IntArray
    borders: IntArray
    grid_SR: IntArray

    def sums(self, values_N: npt.NDArray[Any]) -> FloatArray:
        """Return the sum over the examples of each step and rank, float64 (S, R)."""
        sums_B = np.add.reduceat(values_N[self.examples_N], self.borders[:-1])
        return sums_B[self.grid_SR].astype(np.float64)


def bench_balance(examples: int, repeats: int, quick: bool, json_file: Path | None) -> None:
    """Simulate every number of ranks, time plans, print tables, and write JSON if given.

    Args:
        examples: of an epoch.
        repeats: plans of a million examples that are timed.
        quick: leave out everything with a million examples.
    """
    console = make_console()
    small = Counts.of(make_mix(examples), QWEN3_VL_2B)
    cases = [(ranks, small) for ranks in RANKS]
    report: dict[str, Any] = {"conditions": conditions(), "budget": FULL_BUDGET, "cases": []}
    if not quick:
        # With few steps, the last one weighs much: whole epochs of many ranks have more examples.
        large = Counts.of(make_mix(PLANNED), QWEN3_VL_2B)
        cases.append((RANKS[-1], large))
    for ranks, counts in cases:
        report["cases"].append(simulate(counts, ranks))
        console.print(_table(report["cases"][-1]))
    if not quick:
        report["seconds_to_plan"] = time_plans(large, repeats)
        console.print(_plan_table(report["seconds_to_plan"]))
    share = report["cases"][0]["tower_share"]
    console.print(f"the tower is {share:.0%} of the work; batches of {FULL_BUDGET:,} tokens")
    console.print(one_line(report["conditions"]))
    write_json(report, json_file)


def simulate(counts: Counts, ranks: int) -> dict[str, Any]:
    """Return fill and imbalance of each way to share out the examples over some ranks."""
    tokens, tower = counts.tokens_N.sum(), counts.tower_N.sum()
    # No way can fill its batches more than the fewest whole steps would be filled.
    fewest = -(-tokens // (FULL_BUDGET * ranks)) * ranks
    return {
        "ranks": ranks,
        "examples": len(counts.tokens_N),
        "tower_share": float(tower / (tower + counts.text_N.sum())),
        "fill_ceiling": float(tokens / (FULL_BUDGET * fewest)),
        "ways": {name: _measure(make(counts, ranks), counts) for name, make in WAYS.items()},
    }


def _measure(steps: Steps, counts: Counts) -> dict[str, float]:
    tokens_SR, text_SR, tower_SR = (
        steps.sums(values) for values in (counts.tokens_N, counts.text_N, counts.tower_N)
    )
    total_SR = text_SR + tower_SR
    in_turn = text_SR.max(axis=1) + tower_SR.max(axis=1)
    return {
        "steps": len(steps.grid_SR),
        "fill": float(tokens_SR.mean() / FULL_BUDGET),
        "tokens": imbalance(tokens_SR),
        "tower": imbalance(tower_SR),
        "total": imbalance(total_SR),
        "in_turn": float(in_turn.sum() / total_SR.mean(axis=1).sum()),
    }


def imbalance(work_SR: FloatArray) -> float:
    """Return the work of the slowest ranks over that of the mean ranks, summed over steps."""
    return float(work_SR.max(axis=1).sum() / work_SR.mean(axis=1).sum())


def by_tokens(counts: Counts, ranks: int) -> Steps:
    """Fill batches by first-fit in random order; similar tokens share a step."""
    return _planned(make_sampler(counts, ranks))


def by_work(counts: Counts, ranks: int) -> Steps:
    """Deal examples into batches; similar work shares a step."""
    return _planned(make_sampler(counts, ranks, by_work=True))


def by_length(counts: Counts, ranks: int) -> Steps:
    """Fill batches one after another from examples sorted by length; neighbours share a step."""
    order_N = np.argsort(-counts.tokens_N, kind="stable")
    borders, room = [0], FULL_BUDGET
    for place, tokens in enumerate(counts.tokens_N[order_N].tolist()):
        if tokens > room:
            borders.append(place)
            room = FULL_BUDGET
        room -= tokens
    split = _split(counts, order_N, np.array([*borders, len(order_N)]), ranks)
    return Steps(order_N, split, np.arange(len(split) - 1).reshape(-1, ranks))


def by_visual_tokens(counts: Counts, ranks: int) -> Steps:
    """Fill batches by first-fit in order of falling length; similar visual tokens share a step."""
    longest_N = np.argsort(-counts.tokens_N, kind="stable")
    batch_N = first_fit(counts.tokens_N[longest_N], FULL_BUDGET)
    order_N = longest_N[np.argsort(batch_N, kind="stable")]
    borders = np.concatenate(([0], np.bincount(batch_N).cumsum()))
    split = _split(counts, order_N, borders, ranks)
    visual_B = np.add.reduceat(counts.visual_N[order_N], split[:-1])
    return Steps(order_N, split, np.argsort(-visual_B, kind="stable").reshape(-1, ranks))


WAYS: dict[str, Callable[[Counts, int], Steps]] = {
    "tokens only": by_tokens,
    "length-sorted": by_length,
    "visual tokens": by_visual_tokens,
    "work": by_work,
}


def _split(counts: Counts, order_N: IntArray, borders: IntArray, ranks: int) -> IntArray:
    return split_largest(counts.tokens_N[order_N], borders, (1 - len(borders)) % ranks)


def make_sampler(
    counts: Counts, ranks: int, *, by_work: bool = False, max_patches: int | None = None
) -> TokenBudgetSampler:
    """Return the sampler of rank 0."""
    options: dict[str, Any] = {"rank": 0, "num_replicas": ranks, "max_patches": max_patches}
    if by_work:
        options |= {"patches": counts.patches_N, "patch_pairs": counts.pairs_N}
        options |= {"cost": QWEN3_VL_2B}
    return TokenBudgetSampler(counts.tokens_N, FULL_BUDGET, **options)


def _planned(sampler: TokenBudgetSampler) -> Steps:
    plan = sampler.plan(0)
    return Steps(plan.examples_N, plan.borders, plan.grid_SR)


def time_plans(counts: Counts, repeats: int) -> dict[str, float]:
    """Return median seconds to plan an epoch for 64 ranks, each time another epoch."""
    most = max(int(_MAX_PATCHES * FULL_BUDGET), int(counts.patches_N.max()))
    ways: dict[str, dict[str, Any]] = {
        "tokens only": {},
        "work": {"by_work": True},
        "work, max_patches": {"by_work": True, "max_patches": most},
    }
    seconds = {}
    for name, options in ways.items():
        times = []
        for epoch in range(repeats):
            start = time.perf_counter()
            make_sampler(counts, 64, **options).plan(epoch)
            times.append(time.perf_counter() - start)
        seconds[name] = statistics.median(times)
    return seconds


def _table(case: dict[str, Any]) -> Any:
    title = f"{case['ranks']} ranks, {case['examples']:,} examples"
    columns = ("tokens", "tower", "total", "in turn")
    table = make_table(title, ("batches by",), ("steps", "fill", *columns))
    for name, way in case["ways"].items():
        ratios = (way[column.replace(" ", "_")] for column in columns)
        row = (f"{way['fill']:.3f}", *(f"{ratio:.3f}" for ratio in ratios))
        table.add_row(name, str(way["steps"]), *row)
    return table


def _plan_table(seconds: dict[str, float]) -> Any:
    table = make_table(f"to plan {PLANNED:,}", ("batches by",), ("seconds",))
    for name, median in seconds.items():
        table.add_row(name, f"{median:.2f}")
    return table
