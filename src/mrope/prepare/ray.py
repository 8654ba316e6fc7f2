"""Ray Data: the collator as a collate function of `iter_torch_batches`. Needs the extra `ray`.

`Precheck` goes into `ray.data.Dataset.map_batches` as it is.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
from ray.data.collate_fn import NumpyBatchCollateFn

from mrope.collate.collator import Collate
from mrope.prepare.precheck import examples_of


class RayCollator(NumpyBatchCollateFn):  # type: ignore[misc]  # Ray is not installed for mypy
    """Hand the columns that Ray Data gives a collate function to one that takes examples.

    Args:
        collate: a collate function of a DataLoader, such as `MRopeCollator`.
    """

    def __init__(self, collate: Collate) -> None:
        super().__init__()
        self.collate = collate

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> Any:
        """Return the batch that the collate function makes of the rows of `batch`."""
        return self.collate(examples_of(batch))
