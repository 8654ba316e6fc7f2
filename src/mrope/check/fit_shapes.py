"""Propose a ladder of fixed shapes for the batches of a checked dataset: `mrope check --shapes`.

Shape suffixes: N rows of the dataset, B batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from mrope.arrays import IntArray
from mrope.check.summary import Summary
from mrope.collate.ladder import Ladder, Shapes
from mrope.collate.shapes import check_family
from mrope.columns import NewColumns
from mrope.errors import MRopeError
from mrope.prepare.sampler import TokenBudgetSampler
from mrope.towers import VisionSpec
from mrope.training.dataloader import needs_patches, sampler_options

if TYPE_CHECKING:
    from mrope.training.sections import Config

# Few rows give few batches: epochs are repeated up to so many batches, and so many times.
_BATCHES, _EPOCHS = 2000, 50
# Borders are free while they are empty: room for a fourth more images or examples than were drawn.
_ROOM = 4


class Proposal(NamedTuple):
    """A ladder for the batches that a config makes.

    Attributes:
        ladder: rungs, and their padding.
        batches: how the batches are made, in words.
        keys: of `rope.shapes`.
    """

    ladder: Ladder
    batches: str
    keys: dict[str, int | list[int]]


def require_fixed_shapes(cfg: Config) -> None:
    """Raise if batches of the config's model cannot have fixed shapes.

    Raises:
        MRopeError: see `mrope.collate.shapes.check_family`; or the tower is unknown.
    """
    check_family(cfg.spec(), VisionSpec.from_config(cfg.model.config))


def propose_ladder(cfg: Config, summary: Summary) -> Proposal:
    """Draw batches of the good rows as the config would, and fit a ladder to them.

    With `dataloader.max_tokens` the batches are those of a `TokenBudgetSampler`, else
    `dataloader.batch_size` rows in random order; then the heaviest batch that could be drawn is
    one of them, so that no batch is above the top rung.

    Raises:
        MRopeError: no good row, fewer than a batch takes, or a row above `max_tokens` or
            `max_patches`.
    """
    if not summary.lengths:
        raise MRopeError("--shapes needs at least one good row")
    length_N = np.array(summary.lengths, np.int64)
    flattened = cfg.rope.packing is not None
    drawn = [
        _add_up(batch_B, borders_B, length_N, summary, flattened)
        for batch_B, borders_B in _epochs(cfg, length_N, summary)
    ]
    sizes = {name: np.concatenate([one[name] for one in drawn]) for name in drawn[0]}
    if cfg.dataloader.max_tokens is None:
        sizes = _with_heaviest(sizes, cfg.dataloader.batch_size, length_N, summary, flattened)
    ladder = Shapes.fit(
        sizes["tokens"],
        sizes["patches"],
        sizes["segments"],
        max(summary.largest, cfg.spec().spatial_merge_size ** 2),
        examples=sizes["examples"] if flattened else None,
    )
    return Proposal(ladder, _describe_batches(cfg), _keys(ladder.shapes, flattened))


def print_proposal(proposal: Proposal, console: Console) -> None:
    """Print rungs, padding and graphs, and the keys as YAML and as Python."""
    ladder = proposal.ladder
    table = Table(title=f"fixed shapes, {proposal.batches}", show_header=False)
    for name, rungs, padding in (
        ("tokens", ladder.shapes.tokens, ladder.token_padding),
        ("patches", ladder.shapes.patches, ladder.patch_padding),
    ):
        table.add_row(f"rungs of {name}", ", ".join(f"{rung:,}" for rung in rungs))
        table.add_row(f"padding of {name}", f"{padding:.1%}")
    table.add_row("graphs", str(ladder.graphs))
    console.print(table)
    lines = "".join(f"    {name}: {value}\n" for name, value in proposal.keys.items())
    console.out(f"rope:\n  shapes:\n{lines}", end="", highlight=False)
    arguments = ", ".join(f"{name}={value}" for name, value in proposal.keys.items())
    console.out(f"# in code: Shapes({arguments})", highlight=False)


def proposal_as_json(proposal: Proposal) -> NewColumns:
    """Return the proposal as plain values."""
    ladder = proposal.ladder
    return {
        "batches": proposal.batches,
        "rope.shapes": proposal.keys,
        "token_padding": round(ladder.token_padding, 4),
        "patch_padding": round(ladder.patch_padding, 4),
        "graphs": ladder.graphs,
    }


def _epochs(
    cfg: Config, length_N: IntArray, summary: Summary
) -> Iterator[tuple[IntArray, IntArray]]:
    """Yield the rows of all batches of an epoch, and where each batch begins."""
    options = cfg.dataloader
    if options.max_tokens is not None:
        sampler = _sampler(cfg, length_N, summary, options.max_tokens)
        for epoch in range(_repeats(len(sampler))):
            plan = sampler.plan(epoch)
            yield plan.examples_N, plan.borders[:-1]
        return
    batches = len(length_N) // options.batch_size
    if not batches:
        raise MRopeError(
            f"dataloader.batch_size is {options.batch_size}, but there are only {len(length_N)} "
            "good rows"
        )
    rng = np.random.default_rng(cfg.seed)
    border_B = np.arange(batches) * options.batch_size
    for _ in range(_repeats(batches)):
        yield rng.permutation(len(length_N))[: batches * options.batch_size], border_B


def _sampler(
    cfg: Config, length_N: IntArray, summary: Summary, max_tokens: int
) -> TokenBudgetSampler:
    """Return the sampler of a config without a ladder, for one rank."""
    # Work is estimated without pairs of patches, which the summary lacks.
    patches = np.array(summary.patches, np.int64) if needs_patches(cfg) else None
    return TokenBudgetSampler(
        length_N, max_tokens, patches=patches, **sampler_options(cfg), rank=0, num_replicas=1
    )


def _repeats(batches: int) -> int:
    return min(-(-_BATCHES // batches), _EPOCHS)


def _add_up(
    row_N: IntArray, border_B: IntArray, length_N: IntArray, summary: Summary, flattened: bool
) -> dict[str, IntArray]:
    """Return the sizes of an epoch's batches, each (B,)."""
    # The width of a padded batch is its longest row.
    joined = np.add if flattened else np.maximum
    segment_B = np.add.reduceat(np.array(summary.segments, np.int64)[row_N], border_B)
    example_B = np.diff(border_B, append=len(row_N))
    return {
        "tokens": joined.reduceat(length_N[row_N], border_B),
        "patches": np.add.reduceat(np.array(summary.patches, np.int64)[row_N], border_B),
        "segments": segment_B + segment_B // _ROOM,
        "examples": example_B + example_B // _ROOM,
    }


def _with_heaviest(
    sizes: dict[str, IntArray],
    batch_size: int,
    length_N: IntArray,
    summary: Summary,
    flattened: bool,
) -> dict[str, IntArray]:
    """Add the batch with the most tokens and patches that could be drawn to the sizes."""
    of_tokens = np.sort(length_N)[-batch_size:]
    heaviest = {
        "tokens": of_tokens.sum() if flattened else of_tokens.max(),
        "patches": np.sort(np.array(summary.patches, np.int64))[-batch_size:].sum(),
        "segments": 0,
        "examples": 0,
    }
    return {name: np.append(size_B, heaviest[name]) for name, size_B in sizes.items()}


def _describe_batches(cfg: Config) -> str:
    options = cfg.dataloader
    if options.max_tokens is not None:
        patches = options.max_patches
        also = "" if patches is None else f" and {patches:,} patches"
        return f"flattened batches of up to {options.max_tokens:,} tokens{also}"
    kind = "padded" if cfg.rope.packing is None else "flattened"
    return f"{kind} batches of {options.batch_size} rows"


def _keys(shapes: Shapes, flattened: bool) -> dict[str, int | list[int]]:
    keys: dict[str, int | list[int]] = {
        "tokens": list(shapes.tokens),
        "patches": list(shapes.patches),
        "longest": shapes.longest,
        "patches_per_segment": shapes.patches_per_segment,
    }
    if flattened:
        keys["tokens_per_example"] = shapes.tokens_per_example
    return keys
