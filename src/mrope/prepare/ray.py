"""Collate the batches of Ray Data; requires the extra `ray`.

`Precheck` needs no adapter: it is a function for `ray.data.Dataset.map_batches` as it is.
"""

from __future__ import annotations

from typing import Any

from ray.data.collate_fn import NumpyBatchCollateFn

from mrope.arrays import Array
from mrope.collate.collator import Collate
from mrope.prepare.precheck import examples_of


class RayCollator(NumpyBatchCollateFn):  # type: ignore[misc]  # Ray is not installed for mypy
    """Adapt a collate function of a DataLoader to `iter_torch_batches(collate_fn=...)`.

    Args:
        collate: takes a list of examples, as `MRopeCollator` does.
    """

    def __init__(self, collate: Collate) -> None:
        super().__init__()
        self.collate = collate

    def __call__(self, batch: dict[str, Array]) -> Any:
        """Return what `collate` makes of the rows of `batch`, a column for each name."""
        return self.collate(examples_of(batch))
