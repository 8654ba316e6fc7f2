"""Check one row: run it through the collator, and compare it with transformers' own function.

Workers unpickle this module, so it imports nothing heavier than torch at module level.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset

from mrope.check.row_layout import Misfit, RowLayout, lay_out
from mrope.collate.collator import MRopeCollator
from mrope.collate.read import Rows, read_arguments
from mrope.collate.single_row import batch_of_row, measure, read_row
from mrope.columns import COLUMNS, Columns, NewColumns, columns
from mrope.errors import MRopeError, SpanMismatchError, without_row_0
from mrope.positions.inputs import BatchInputs
from mrope.positions.spans import token_types
from mrope.spec.references import installed_transformers, resolve_reference
from mrope.spec.spec import MRopeSpec
from mrope.towers import VisionSpec

# What transformers' functions do not take: they number rows of one example.
_OURS_ALONE = frozenset(columns("row"))


class Examples(Protocol):
    """A map-style dataset of rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Columns: ...


@dataclass(frozen=True)
class RowCheck:
    """Result of checking one row.

    Attributes:
        row: index in the dataset.
        tokens: number of valid tokens.
        images, videos: number of grids of each.
        frames: temporal positions of the videos: the sum of the first sizes of their grids.
        patches: patches of all grids.
        largest: patches of the largest image or frame.
        compared: whether the reference's own function gave equal position ids.
        unanswered: type of exception that the reference's own function raised although the row is
            good.
        cause: None in a good row; otherwise the same text in all rows that are bad for one reason.
        message: error of this row.
        layout: runs of a bad row, if its tokens can be read.
    """

    row: int
    tokens: int = 0
    images: int = 0
    videos: int = 0
    frames: int = 0
    patches: int = 0
    largest: int = 0
    compared: bool = False
    unanswered: str | None = None
    cause: str | None = None
    message: str | None = None
    layout: RowLayout | None = None


class CheckedRows(Dataset[RowCheck]):
    """A dataset of results: item i is the `RowCheck` of row i. Bad rows do not raise.

    Args:
        examples: the rows: `input_ids` (S,) and other inputs of the collator, as tensors, arrays or
            lists.
        spec: the model's values.
        vision: values of the vision tower, to compute its tensors for every row too.
        compare: compare each row with the installed transformers' own function.
    """

    def __init__(
        self,
        examples: Examples,
        spec: MRopeSpec,
        vision: VisionSpec | None = None,
        *,
        compare: bool = False,
    ) -> None:
        self.examples = examples
        self.spec = spec
        self.compare = compare
        self.collate = MRopeCollator(_as_batch, spec, vision)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> RowCheck:
        return self.check_row(index)[0]

    def check_row(self, index: int) -> tuple[RowCheck, NewColumns]:
        """Check a row; return the result and the row as a batch, collated if the row is good."""
        batch: NewColumns = {}
        try:
            row = self.examples[index]  # once: a conversation is prepared each time it is read
            batch = _as_batch([row])
            batch = self.collate([row])
            check = _counted(index, read_row(self.spec, row).inputs)
            return (self._compared(check, row, batch) if self.compare else check), batch
        # Rows and images come from users: no list of exception types would be complete.
        except Exception as error:  # noqa: BLE001
            return self._bad(index, batch, error), batch

    def _compared(self, check: RowCheck, example: Columns, batch: Columns) -> RowCheck:
        from mrope.hf.get_rope_index import reference_rope_index

        row = _as_batch([example])
        rows = Rows([row], row["input_ids"])
        arguments, _ = read_arguments(self.spec, row, rows, apart=False)
        arguments.setdefault("mm_token_type_ids", token_types(self.spec, arguments["input_ids"]))
        own = _OURS_ALONE.difference(self.spec.family_row.inputs)
        arguments = {name: value for name, value in arguments.items() if name not in own}
        try:
            theirs = reference_rope_index(self.spec, arguments)
        # transformers raises whatever its loops run into: StopIteration, IndexError, ...
        except Exception as error:  # noqa: BLE001
            return replace(check, unanswered=type(error).__name__)
        _require_equal(self.spec, batch, theirs)
        return replace(check, compared=True)

    def _bad(self, index: int, batch: Columns, error: Exception) -> RowCheck:
        try:
            layout = lay_out(self.spec, batch, error)
        # The error of the row may also be why it cannot be cut into runs.
        except (MRopeError, ValueError, TypeError, LookupError, AttributeError):
            return RowCheck(index, cause=_cause(error), message=_message(error, index))
        if isinstance(error, DifferenceError):
            layout = replace(layout, misfit=Misfit(error.token, 1, None))
        return RowCheck(index, cause=_cause(error), message=_message(error, index), layout=layout)


class DifferenceError(MRopeError):
    """`mrope` and the installed transformers compute different position ids for a row.

    Attributes:
        token: index of the first valid token that differs.
    """

    def __init__(self, message: str, token: int) -> None:
        super().__init__(message)
        self.token = token


def describe_comparison(spec: MRopeSpec) -> tuple[bool, str]:
    """Return whether rows can be compared with the installed transformers, and a sentence on it."""
    installed = installed_transformers()
    if installed is None:
        return False, "not compared: transformers is not installed"
    try:
        era = resolve_reference("auto", installed)
    except MRopeError as error:
        return False, f"not compared: {error}"
    if era != spec.reference:
        return False, (
            f"not compared: rows follow {spec.reference}, but transformers {installed} is installed"
        )
    try:
        from mrope.hf.get_rope_index import reference_class

        reference_class(spec.family)
    except (ImportError, StopIteration):
        return (
            False,
            f"not compared: transformers {installed} has no get_rope_index for {spec.family}",
        )
    return True, f"compared with the own function of transformers {installed}"


def _as_batch(examples: Sequence[Columns]) -> NewColumns:
    """Return one row as a batch of what the table of columns names, without casting or padding."""
    (row,) = examples
    return batch_of_row({name: value for name, value in row.items() if name in COLUMNS})


def _counted(index: int, inputs: BatchInputs) -> RowCheck:
    size, clips = measure(inputs), inputs.media["video"].size_N3
    return RowCheck(
        row=index,
        tokens=size.tokens,
        images=len(inputs.media["image"].size_N3),
        videos=len(clips),
        frames=int(clips[:, 0].sum()),
        patches=size.patches,
        largest=size.longest,
    )


def _require_equal(spec: MRopeSpec, batch: Columns, theirs: tuple[Any, Any]) -> None:
    """Raise `DifferenceError` if position ids or deltas differ from the reference's."""
    valid = np.ones(np.shape(batch["input_ids"]), np.bool_)
    if "attention_mask" in batch:
        valid = np.asarray(batch["attention_mask"]).astype(np.bool_)
    ours = batch["position_ids"].numpy()[:, valid]
    other = theirs[0][:, valid]
    differs_T = (ours != other).any(axis=0)
    if differs_T.any():
        token = int(differs_T.argmax())
        raise DifferenceError(
            f"valid token {token} has position {ours[:, token].tolist()}, but {spec.reference}'s "
            f"own function gives {other[:, token].tolist()}",
            token,
        )
    delta, other_delta = int(batch["rope_deltas"][0, 0]), int(theirs[1][0, 0])
    if delta != other_delta:
        raise DifferenceError(
            f"delta {delta}, but {spec.reference}'s own function gives {other_delta}",
            token=ours.shape[1] - 1,
        )


def _cause(error: Exception) -> str:
    """Return a text that rows with the same kind of error share."""
    if isinstance(error, SpanMismatchError) and error.cause is not None:
        return error.cause
    if isinstance(error, DifferenceError):
        return "position ids differ from transformers"
    if not isinstance(error, MRopeError):
        return f"the row cannot be read: {type(error).__name__}"
    text = without_row_0(re.sub(r"^row \d+ of the dataset: ", "", str(error)))
    if found := re.search(r" Likely cause: (.*)\.$", text, re.DOTALL):
        text = found[1]
    # Drop what differs between rows: [1, 3, 2] and 'a.png' become [N, N, N] and '...'.
    return re.sub(r"-?\d+(\.\d+)?", "N", re.sub(r"'[^']*'", "'...'", text))


def _message(error: Exception, index: int) -> str:
    """Return an error's message without "row 0", the row's index in its batch of one."""
    text = without_row_0(str(error).removeprefix(f"row {index} of the dataset: "))
    return text if isinstance(error, MRopeError) else f"{type(error).__name__}: {text}"
