"""The batches of every rank of a training run on the mix of `python -m measure balance`.

One epoch of the same examples is planned twice, by tokens and by work.

Shape suffixes: N examples, S steps, R ranks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from measure.balance import Steps, imbalance
from measure.mix import Mix, MixRows, make_mix
from mrope import MRopeCollator, MRopeSpec, Shapes, TokenBudgetSampler, VisionSpec
from mrope.prepare import WorkModel

CONFIG = Path(__file__).parents[2] / "configs/bench/models/2b.json"
BALANCES = ("tokens", "work")
# Batches are filled so far at the least: the last step is split from others.
FILL = 0.95
# Tokens of the examples that `complete` may add, one of an image and one of a clip.
MARGIN = 32
# Patches for a token of the budget. A few clips of the mix have more, and are left out.
MOST_PATCHES = 3.5
# Narrow layers, for CPUs.
TINY_TEXT = {
    "vocab_size": 19200,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}
TINY_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "out_hidden_size": 64,
    "patch_size": 4,
}
TINY_IDS = {
    "image_token_id": 19000,
    "video_token_id": 19001,
    "vision_start_token_id": 19002,
    "vision_end_token_id": 19003,
}
Batch = dict[str, Any]


def qwen3_vl_config(tiny: bool, layers: int | None) -> Batch:
    """Return the config of a Qwen3-VL of 2B shape.

    Args:
        tiny: narrow layers, 2 unless `layers` is given.
        layers: of the text model, and of the tower; None: those of the 2B shape.
    """
    config: Batch = json.loads(CONFIG.read_text(encoding="utf-8"))
    if tiny:
        config |= TINY_IDS
        config["text_config"] |= TINY_TEXT
        config["vision_config"] |= TINY_VISION
        layers = layers or 2
    if layers is not None:
        config["text_config"]["num_hidden_layers"] = config["vision_config"]["depth"] = layers
        config["vision_config"]["deepstack_visual_indexes"] = list(range(min(3, layers)))
    return config


class Epoch:
    """One epoch of the same examples, planned by tokens and by work.

    Args:
        config: of a Qwen3-VL.
        ranks: that share it.
        tokens: of a rank's batch.
        steps: about how many.
        graphs: most pairs of rungs of the ladder.
        dtype: of the pixels.

    Attributes:
        examples_N: int64 (N,), the examples of the mix.
        work_N: float64 (N,), their work.
        steps: the steps of each plan, see `Steps`; their examples index `examples_N`.
        shapes: a ladder for the batches of both plans.
    """

    def __init__(
        self,
        config: Batch,
        ranks: int,
        tokens: int,
        steps: int,
        graphs: int,
        dtype: torch.dtype,
    ) -> None:
        self.spec, self.vision = MRopeSpec.from_config(config), VisionSpec.from_config(config)
        self.mix, self.tokens, self.ranks = make_mix(16 * steps * ranks, tokens), tokens, ranks
        fits = np.flatnonzero(self.mix.patches() <= MOST_PATCHES * tokens)
        ends = self.mix.tokens()[fits].cumsum()
        self.examples_N = fits[: np.searchsorted(ends, FILL * tokens * ranks * steps)]
        mix, chosen = self.mix, self.examples_N
        names = ("tokens", "patches", "patch_pairs", "segments")
        self.counts = {name: getattr(mix, name)()[chosen] for name in names}
        work = WorkModel.from_config(config)
        self.work_N = work(*(self.counts[name] for name in names[:3]))
        self.steps = {
            balance: self._plan(work if balance == "work" else None) for balance in BALANCES
        }
        self.shapes = self._fit_shapes(graphs)
        torch.manual_seed(1)
        pixels = torch.randn(int(self.counts["patches"].max()), _patch_values(config))
        self.rows = MixRows(mix, self.spec, pixels.to(dtype))

    def _plan(self, work: WorkModel | None) -> Steps:
        counts = self.counts
        options = {} if work is None else {"patch_pairs": counts["patch_pairs"], "cost": work}
        plan = TokenBudgetSampler(
            counts["tokens"],
            self.tokens - MARGIN,
            patches=counts["patches"],
            max_patches=int(MOST_PATCHES * self.tokens),
            rank=0,
            num_replicas=self.ranks,
            **options,
        ).plan(0)
        return Steps(plan.examples_N, plan.borders, plan.grid_SR)

    def _fit_shapes(self, graphs: int) -> Shapes:
        columns = self.counts | {"examples": np.ones(len(self.examples_N), np.int64)}
        # An image and a clip may be added.
        added = {"tokens": MARGIN, "patches": 8, "segments": 2, "examples": 2}
        sizes = {
            name: np.concatenate([self._sums(one, columns[name]).ravel() for one in BALANCES])
            + more
            for name, more in added.items()
        }
        sizes["tokens"][:] = self.tokens
        longest = int(self.mix.grids_G3[:, 1:].prod(axis=1).max())
        return Shapes.fit(**sizes, longest=longest, graphs=graphs).shapes

    def _sums(self, balance: str, values_N: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        return self.steps[balance].sums(values_N).astype(np.int64)

    def describe(self, balance: str) -> Batch:
        """Return what a plan is, and what it promises."""
        steps = self.steps[balance]
        tokens_SR = steps.sums(self.counts["tokens"])
        return {
            "steps": len(tokens_SR),
            "examples": len(self.examples_N),
            "fill": float(tokens_SR.mean() / self.tokens),
            "token_imbalance": imbalance(tokens_SR),
            "work_imbalance": imbalance(steps.sums(self.work_N)),
        }

    def batches(self, balance: str, rank: int, vision: bool, shapes: Shapes | None) -> list[Batch]:
        """Return a rank's batches, one flattened row each.

        Args:
            balance: the plan.
            rank: whose.
            vision: compute the tower's tensors.
            shapes: pad to a ladder.
        """
        tensors = self.vision if vision else None
        collate = MRopeCollator(None, self.spec, tensors, packing="flatten", shapes=shapes)
        steps = self.steps[balance]
        batches = []
        for number in steps.grid_SR[:, rank]:
            examples = steps.examples_N[slice(*steps.borders[number : number + 2])]
            rows = [self.rows[int(one)] for one in self.examples_N[examples]]
            batches.append(collate(complete(rows, self.rows)))
        return batches


def complete(rows: list[Batch], source: MixRows) -> list[Batch]:
    """Return rows with an image and a clip among them; what is added has one token and no labels.

    A tower that takes images and clips in two calls, or none, would otherwise run a different
    number of times on each rank, and under FSDP2 the ranks' collectives would no longer match.
    """
    for name, clip in (("image_grid_thw", False), ("video_grid_thw", True)):
        if not any(name in row for row in rows):
            one = Mix(np.array([1]), np.array([[1, 2, 2]]), np.array([0, 1]), np.array([clip]))
            row = MixRows(one, source.spec, source.pixels)[0]
            rows = [*rows, {**row, "labels": torch.full_like(row["labels"], -100)}]
    return rows


def _patch_values(config: Batch) -> int:
    vision = config["vision_config"]
    values: int = 3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    return values
