"""Let transformers generate from a batch of the stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mrope.columns import Columns, NewColumns, columns
from mrope.errors import MRopeError

# What the stage adds to a batch, beside position ids.
_ADDED = frozenset(columns("derived"))
# What batches of one flattened row, and of fixed shapes, have.
_NO_PROMPTS = ("seq_idx", "vision_feature_mask")
# How many calls of `generate` run. Not a ContextVar, which `torch.compile` cannot read.
_generating = 0


def for_generate(batch: Columns) -> NewColumns:
    """Return a batch as `model.generate(**batch)` takes it: as the inner collate function made it.

    `generate` numbers the tokens itself, those that it adds too, and refuses keys that it does not
    know. Where `mrope.hf` is imported, it calls this for every batch of the stage.

    Args:
        batch: of a `MRopeCollator` or of its inner collate function; rows padded on the left.

    Raises:
        MRopeError: one flattened row, or fixed shapes: its rows are no prompts.
    """
    wrong = next((name for name in _NO_PROMPTS if batch.get(name) is not None), None)
    if wrong is not None:
        raise MRopeError(
            f"generate takes rows of one prompt each, and the batch has {wrong}: give the "
            "collator of the evaluation neither packing nor shapes"
        )
    if not of_the_stage(batch):
        return dict(batch)
    return {
        name: value
        for name, value in batch.items()
        if name not in _ADDED and name != "position_ids"
    }


def of_the_stage(batch: Columns) -> bool:
    """Whether a batch has anything that the stage adds, beside position ids."""
    return not _ADDED.isdisjoint(batch)


@contextmanager
def while_generating() -> Iterator[None]:
    """Let attached models take batches that no stage has made: `generate` numbers its own."""
    global _generating
    _generating += 1
    try:
        yield
    finally:
        _generating -= 1


def is_generating() -> bool:
    """Whether `generate` is running, which without a cache gives pixels and sound at each step."""
    return _generating > 0
