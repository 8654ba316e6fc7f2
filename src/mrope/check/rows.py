"""Check one row: run it through the collator, and compare it with transformers' own function.

Workers unpickle this module, so it imports nothing heavier than torch at module level.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from mrope.check.row_layout import Misfit, RowLayout, lay_out
from mrope.collate.collator import MRopeCollator
from mrope.collate.samples import FLAGS, GRIDS, KNOWN, PIXELS, TOKENS, axes_of, read_sample
from mrope.errors import MRopeError, SpanMismatchError
from mrope.positions.spans import token_types
from mrope.spec.references import installed_transformers, resolve_reference
from mrope.spec.spec import MRopeSpec
from mrope.towers import VisionSpec

# Key in a batch, and argument of `reference_rope_index`.
_REFERENCE_TAKES = {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "image_grid_thw": "image_grid_thw",
    "video_grid_thw": "video_grid_thw",
    "video_second_per_grid": "second_per_grid_ts",
    "second_per_grid_ts": "second_per_grid_ts",
}


class Examples(Protocol):
    """A map-style dataset of rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


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

    def check_row(self, index: int) -> tuple[RowCheck, dict[str, Any]]:
        """Check a row; return the result and the row as a batch, collated if the row is good."""
        batch: dict[str, Any] = {}
        try:
            example = _as_tensors(self.examples[index], self.spec.family_row.inputs)
            batch = _as_batch([example])
            batch = self.collate([example])
            check = _counted(index, batch)
            return (self._compared(check, batch) if self.compare else check), batch
        # Rows and images come from users: no list of exception types would be complete.
        except Exception as error:  # noqa: BLE001
            return self._bad(index, batch, error), batch

    def _compared(self, check: RowCheck, batch: Mapping[str, Any]) -> RowCheck:
        from mrope.hf.get_rope_index import reference_rope_index

        inputs = self.spec.family_row.inputs
        takes = _REFERENCE_TAKES | {name: name for name in inputs}
        arguments = {theirs: batch[ours] for ours, theirs in takes.items() if ours in batch}
        if "audio_seqlens" in inputs and "feature_attention_mask" in batch:
            # As the thinkers' forward counts them.
            arguments["audio_seqlens"] = batch["feature_attention_mask"].sum(dim=-1)
        types = batch.get("mm_token_type_ids")
        if types is None:
            types = torch.from_numpy(token_types(self.spec, batch["input_ids"].numpy()))
        try:
            theirs = reference_rope_index(self.spec, arguments | {"mm_token_type_ids": types})
        # transformers raises whatever its loops run into: StopIteration, IndexError, ...
        except Exception as error:  # noqa: BLE001
            return replace(check, unanswered=type(error).__name__)
        _require_equal(self.spec, batch, theirs)
        return replace(check, compared=True)

    def _bad(self, index: int, batch: Mapping[str, Any], error: Exception) -> RowCheck:
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


def _as_tensors(example: Mapping[str, Any], inputs: tuple[str, ...]) -> dict[str, Any]:
    """Read the columns that a model takes, each as a tensor; of pixels only the shape is read.

    Args:
        inputs: `Family.inputs`, which its rule reads too.
    """
    kept: dict[str, Any] = {}
    for name, value in read_sample(example).items():
        if name in FLAGS or (name in PIXELS and axes_of(value) > 1):
            kept[name] = value
        elif value is not None and (name in KNOWN or name in inputs) and name not in PIXELS:
            kept[name] = _tensor(name, value)
    return kept


def _tensor(name: str, value: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MRopeError(f"{name} is ragged, or holds something other than numbers") from error


def _as_batch(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one example as a batch without casting or padding.

    Raises:
        MRopeError: the example has no tokens, or a token column of several rows.
    """
    (example,) = examples
    if "input_ids" not in example:
        raise MRopeError("no input_ids: the column is missing or null")
    batch = dict(example)
    for name in TOKENS:
        if name in batch:
            if batch[name].ndim != 1:
                raise MRopeError(f"{name} must be (n,) or (1, n), not {(*batch[name].shape,)}")
            batch[name] = batch[name][None]
    return batch


def _counted(index: int, batch: Mapping[str, Any]) -> RowCheck:
    mask, clips = batch.get("attention_mask"), batch.get("video_grid_thw")
    grids = [batch[name] for name in GRIDS if batch.get(name) is not None]
    sides = [grid[:, 1:].prod(dim=1) for grid in grids if len(grid)]
    return RowCheck(
        row=index,
        tokens=batch["input_ids"].numel() if mask is None else int(mask.count_nonzero()),
        images=len(batch.get("image_grid_thw", ())),
        videos=0 if clips is None else len(clips),
        frames=0 if clips is None else int(clips[:, 0].sum()),
        patches=sum(int(grid.prod(dim=1).sum()) for grid in grids),
        largest=max((int(side.max()) for side in sides), default=0),
    )


def _require_equal(spec: MRopeSpec, batch: Mapping[str, Any], theirs: tuple[Any, Any]) -> None:
    """Raise `DifferenceError` if position ids or deltas differ from the reference's."""
    valid = np.ones(batch["input_ids"].shape, np.bool_)
    if "attention_mask" in batch:
        valid = batch["attention_mask"].numpy().astype(np.bool_)
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
    text = re.sub(r"^row \d+ of the dataset: ", "", str(error))
    if found := re.search(r" Likely cause: (.*)\.$", text, re.DOTALL):
        text = found[1]
    # Drop what differs between rows: [1, 3, 2] and 'a.png' become [N, N, N] and '...'.
    return re.sub(r"-?\d+(\.\d+)?", "N", re.sub(r"'[^']*'", "'...'", text))


def _message(error: Exception, index: int) -> str:
    """Return an error's message without "row 0", the row's index in its batch of one."""
    text = str(error).removeprefix(f"row {index} of the dataset: ").removeprefix("row 0, ")
    return text if isinstance(error, MRopeError) else f"{type(error).__name__}: {text}"
