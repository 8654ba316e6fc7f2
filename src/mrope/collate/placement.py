"""Say where each token of the stream stands in the batch that the model gets, and put it there.

`Padded` places tokens in rows; `mrope.collate.packing.OneRow` places all of them in one row.

Shape suffixes: T tokens of the stream, K of them that a part of the sequence keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from mrope.arrays import Array, BoolArray, IntArray
from mrope.collate.ladder import Shapes, choose_rung
from mrope.collate.values import as_tensor, plain
from mrope.columns import COLUMNS, Batch, Columns, NewColumns, fill_of
from mrope.errors import MRopeError
from mrope.positions.located import Located

_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
Values = TypeVar("Values", Array, torch.Tensor)


class Placement(NamedTuple):
    """Where the tokens of a stream stand in a batch of `rows` x `width` places.

    Attributes:
        rows, width: of the batch that the model gets.
        place_T: flat index of each token; None: token t stands at t.
        kept_K: the tokens that are there, ascending, where others are left out: then there is one
            place for each of these. None: all are.
        tail: tokens of the padding segment at the end of one row.
        gaps: whether padding stands in the rows that only a mask tells from tokens.
        behind: whether there is padding, all of it behind the tokens of its row.

    Example:
        Rows of 2 and 3 tokens in a batch that is 4 wide:

        >>> rows = Placement(2, 4, np.array([0, 1, 4, 5, 6]))
        >>> rows.put(np.array([7, 8, 9, 9, 9]), 0).tolist()
        [[7, 8, 0, 0], [9, 9, 9, 0]]
        >>> rows.places(np.array([False, True, True, False, False])).tolist()
        [1, 4]
    """

    rows: int
    width: int
    place_T: npt.NDArray[np.int64] | None = None
    kept_K: IntArray | None = None
    tail: int = 0
    gaps: bool = False
    behind: bool = False

    def put(self, values_T: Values, fill: float) -> Values:
        """Lay values of tokens, (T, ...), out as (rows, width, ...), with `fill` at padding.

        Returns:
            A view of `values_T` where nothing moves, else a new array or tensor.
        """
        if self.kept_K is not None:
            values_T = values_T[self.kept_K]
        shape = (self.rows, self.width, *values_T.shape[1:])
        size = self.rows * self.width
        if self.place_T is None and len(values_T) == size:
            return values_T.reshape(shape)
        if isinstance(values_T, torch.Tensor):
            out = values_T.new_full((size, *values_T.shape[1:]), fill)
        else:
            out = np.full((size, *values_T.shape[1:]), fill, values_T.dtype)
        out[slice(len(values_T)) if self.place_T is None else self.place_T] = values_T
        return out.reshape(shape)

    def places(self, of_T: BoolArray) -> npt.NDArray[np.int64]:
        """Return the flat index of the tokens that a mask selects: a scatter index."""
        of = of_T if self.kept_K is None else of_T[self.kept_K]
        index = of.nonzero()[0]
        places: npt.NDArray[np.int64] = index if self.place_T is None else self.place_T[index]
        return places


def token_columns(batch: Columns, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Return the columns of a batch that have an entry for each token, as tensors (B, S, ...).

    By `mrope.columns.COLUMNS`; a column of the user, which the table does not name, is one if its
    first two axes are those of the tokens.

    Raises:
        MRopeError: a token column of another shape.
    """
    return {
        name: column
        for name, value in batch.items()
        if (column := _token_column(name, value, shape)) is not None
    }


def _token_column(name: str, value: object, shape: tuple[int, ...]) -> torch.Tensor | None:
    column = COLUMNS.get(name)
    if value is None or (column is not None and column.kind != "token"):
        return None
    if column is None and (
        not isinstance(value, (torch.Tensor, np.ndarray))
        or value.shape[:2] != shape
        or (isinstance(value, np.ndarray) and value.dtype.kind not in "biuf")
    ):
        return None
    tensor = as_tensor(name, plain(value))
    if tensor.shape[:2] != shape:
        raise MRopeError(f"{name} has shape {tuple(tensor.shape)}, but input_ids {shape}")
    # torch selects none of these.
    return tensor.to(torch.int64) if tensor.dtype in _UNSIGNED else tensor


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
        # Tokens with padding in front.
        late_BS = None if valid_BS is None else valid_BS[:, :-1] < valid_BS[:, 1:]
        behind = late_BS is not None and not late_BS.any()
        if self.shapes is None:
            return Placement(rows, width, place_T, gaps=late_BS is not None, behind=behind)
        lengths = [width] * rows if valid_BS is None else valid_BS.sum(axis=1).tolist()
        rung = choose_rung("tokens", self.shapes.tokens, width, lengths)
        if late_BS is not None and not behind:
            raise MRopeError(
                f"row {late_BS.any(axis=1).argmax()}: shapes needs padding on the right, where a "
                "causal mask hides it; give the inner collate function padding_side='right', or "
                "packing='flatten'"
            )
        place_T = np.arange(rows * width) if place_T is None else place_T
        # Row 1 of 4 tokens, index 6: its token 2, which has index 10 in rows of 8.
        place_T = place_T + place_T // max(width, 1) * (rung - width)
        return Placement(rows, rung, place_T, gaps=valid_BS is not None)

    def lay_out(self, batch: Batch, located: Located, placement: Placement) -> NewColumns:
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
        self, positions_AT: Array, fill: int, _: Located, placement: Placement
    ) -> Array:
        """Return (A, B, S), with the reference's fill at padding."""
        axes, rows, width = len(positions_AT), placement.rows, placement.width
        place_T = placement.place_T
        if place_T is None:
            return positions_AT.reshape(axes, rows, width)
        out = np.full((axes, rows * width), fill, positions_AT.dtype)
        for axis, values_T in zip(out, positions_AT, strict=True):
            axis[place_T] = values_T
        return out.reshape(axes, rows, width)

    def count(self, _: Located, placement: Placement) -> IntArray:
        """Return (B, S): tokens counted along each row, padding included."""
        return np.tile(np.arange(placement.width), (placement.rows, 1))
