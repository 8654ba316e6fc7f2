"""Batches in rows, as the inner collate function padded them, or padded further to a rung."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from mrope.arrays import BoolArray
from mrope.collate.ladder import Shapes, choose_rung
from mrope.collate.placement import Placement, token_columns
from mrope.columns import fill_of
from mrope.errors import MRopeError
from mrope.positions.located import Located


@dataclass(frozen=True)
class Padded:
    """Rows of the inner collate function.

    Attributes:
        shapes: the ladder that rows are padded further to, on the right; None: they stay.
    """

    shapes: Shapes | None = None

    # A row is one example.
    apart: ClassVar[bool] = False
    has_deltas: ClassVar[bool] = True

    def place(self, located: Located) -> Placement:
        """Return where tokens stand: where the inner function put them.

        Raises:
            MRopeError: above the top rung, or padding that is not on the right of a rung.
        """
        rows, width = located.inputs.shape
        valid_BS = located.stream.valid_BS
        place_T = None if valid_BS is None else np.flatnonzero(valid_BS)
        if self.shapes is None:
            return Placement(rows, width, place_T, gaps=valid_BS is not None)
        lengths = [width] * rows if valid_BS is None else valid_BS.sum(axis=1).tolist()
        rung = choose_rung("tokens", self.shapes.tokens, width, lengths)
        _refuse_left_padding(valid_BS)
        place_T = np.arange(rows * width) if place_T is None else place_T
        # Row 1 of 4 tokens, index 6: its token 2, which has index 10 in rows of 8.
        place_T = place_T + place_T // max(width, 1) * (rung - width)
        return Placement(rows, rung, place_T, gaps=valid_BS is not None)

    def lay_out(
        self, batch: MutableMapping[str, Any], located: Located, placement: Placement
    ) -> dict[str, Any]:
        """Widen the token columns of the batch to the rung, in place.

        The attention mask goes then: under a causal mask no token attends to padding on its right,
        and the model's kernels need no mask.

        Returns:
            With a ladder `use_cache` False: a training step needs no cache, and gradient
            checkpointing would break the graph to say so.

        Raises:
            MRopeError: a token column of another shape.
        """
        if self.shapes is None:
            return {}
        rows, width = located.inputs.shape
        batch.pop("attention_mask", None)
        for name, column in token_columns(batch, (rows, width)).items():
            fill = fill_of(name, self.shapes.pad_token_id)
            # What stands at padding of the inner function stays.
            wide = column.new_full((rows, placement.width, *column.shape[2:]), fill)
            wide[:, :width] = column
            batch[name] = wide
        return {"use_cache": False}

    def position_ids(
        self, positions_AT: npt.NDArray[Any], fill: int, _: Located, placement: Placement
    ) -> npt.NDArray[Any]:
        """Return (A, B, S), with the reference's fill at padding."""
        return placement.put_axes(positions_AT, fill)


def _refuse_left_padding(valid_BS: BoolArray | None) -> None:
    if valid_BS is not None and (valid_BS[:, :-1] < valid_BS[:, 1:]).any():
        row = int((valid_BS[:, :-1] < valid_BS[:, 1:]).any(axis=1).argmax())
        raise MRopeError(
            f"row {row}: shapes needs padding on the right, where a causal mask hides it; give the "
            "inner collate function padding_side='right', or packing='flatten'"
        )
