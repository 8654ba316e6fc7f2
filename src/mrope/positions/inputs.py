"""Check and type every argument of a batch that its position ids depend on, once.

Shape suffixes: B rows of the batch, S padded length, N images, clips or audios of a modality.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mrope.arrays import BoolArray, IntArray, as_array, as_grid, as_integers
from mrope.columns import COLUMNS, MODALITIES, Columns, NewColumns, columns, count_key
from mrope.errors import MRopeError
from mrope.spec.families import find_family
from mrope.spec.spec import MRopeSpec

SECONDS, *_ = columns("item", means="seconds")
"""Name of the seconds of clips in `rope_index`, which models take too."""

# Processors give these for every family; a family whose position ids do not depend on them ignores
# them. Any other input that a family does not read is a mistake of the caller.
_FOR_ALL = frozenset(
    (
        "input_ids",
        "attention_mask",
        "mm_token_type_ids",
        SECONDS,
        *(name for name in columns("item", means="size") if COLUMNS[name].sides == 3),
        *map(count_key, ("image", "video")),
    )
)
_FLAGS = tuple(name for name in columns("batch") if COLUMNS[name].integers)
_MODES = tuple(name for name in columns("batch") if not COLUMNS[name].integers)
_MERGES = {one: tuple(columns("item", modality=one, means="merge")) for one in MODALITIES}
_IN_BATCH = frozenset(columns("item", means="merge"))
_NO_SIZES = as_grid("", None)
_HINTS = {
    3: "frames, height and width in patches",
    2: "height and width in patches",
    1: "mel frames of each audio",
}


class Media(NamedTuple):
    """The images, the clips or the audios of a batch, in its order.

    Attributes:
        size_N3: int64: frames, height and width in patches. A crop is one frame; an audio is as
            many frames as its mel frames, of height and width 1.
        count_B: how many of them each row has; None: unknown.
        merge: patches along each side that share a token.
        seconds_N: between two temporal positions of each clip, in seconds; None: none were given,
            or the family does not read them.
        seconds_dtype: dtype in which seconds are multiplied by a frame's number.
        kept: bool (features,), which features have a token; None: all.
        name: column that the sizes came in, for messages; empty where the batch has none.
    """

    size_N3: npt.NDArray[np.int64] = _NO_SIZES
    count_B: IntArray | None = None
    merge: int = 1
    seconds_N: npt.NDArray[np.number[Any]] | None = None
    seconds_dtype: npt.DTypeLike = np.float32
    kept: BoolArray | None = None
    name: str = ""

    def row_of(self, ordinal: int) -> str:
        """Return "row 3: " for an image, clip or audio of that row; "" if it is unknown."""
        count_B = self.count_B
        if count_B is None or count_B.ndim != 1 or count_B.sum() != len(self.size_N3):
            return ""
        return f"row {int(count_B.cumsum().searchsorted(ordinal, side='right'))}: "


_NO_MEDIA = dict.fromkeys(MODALITIES, Media())


class BatchInputs(NamedTuple):
    """A batch whose arguments were checked one by one: shapes, dtypes and values that stand alone.

    Whether they fit together (tokens and sizes, counts and rows) is checked where both are known:
    in `mrope.positions.rope_index.locate`, or in the family's own module.

    Attributes:
        input_ids: (B, S) integers.
        valid: (B, S) bool, False at padding; None where the batch has no padding.
        types: `mm_token_type_ids`, (B, S) integers, or None.
        seq_lengths: for each row the tokens of the examples that it holds; None: a row is one.
        media: by modality, "image", "video" and "audio"; without sizes where the batch has none.
        shape: (B, S).
        flags: `use_audio_in_video` of the Omni thinkers, a bool, or one for each clip.
    """

    input_ids: IntArray
    valid: BoolArray | None
    types: IntArray | None
    seq_lengths: Sequence[npt.ArrayLike] | npt.ArrayLike | None
    media: Mapping[str, Media]
    shape: tuple[int, int]
    flags: Mapping[str, BoolArray]

    @property
    def has_grids(self) -> bool:
        """Whether the batch came with images or clips at all, be it without any row."""
        return any(self.media[modality].name for modality in ("image", "video"))


def check_inputs(
    spec: MRopeSpec, given: Columns, seconds_dtype: npt.DTypeLike = np.float32
) -> BatchInputs:
    """Check the arguments of `mrope.rope_index`, whose docstring says what each of them is.

    Args:
        given: arguments by the names of their columns, without those that are absent; arrays or
            lists.
        seconds_dtype: see `Media`.

    Raises:
        MRopeError: an argument of a wrong shape, dtype or value.
        TypeError: an argument that the spec's family does not read.
    """
    if not _known(spec.family).issuperset(given):
        unread = sorted(set(given) - _known(spec.family))
        raise TypeError(f"rope_index takes no {', '.join(unread)} for {spec.family}")
    ids = as_integers("input_ids", given["input_ids"], "token ids")
    if ids.ndim != 2:
        raise MRopeError(f"input_ids must have shape (B, S), not {ids.shape}")
    rows, width = ids.shape
    types = given.get("mm_token_type_ids")
    if types is not None:
        types = as_integers("mm_token_type_ids", types, "0 text, 1 image, 2 video")
        if types.shape != ids.shape:
            raise length_error("mm_token_type_ids", types.shape, ids.shape)
        types = types if reads_types(spec) else None
    mask = given.get("attention_mask")
    return BatchInputs(
        input_ids=ids,
        valid=None if mask is None else _as_valid(spec, mask, ids.shape),
        types=types,
        seq_lengths=given.get("seq_lengths"),
        media=_as_media(spec, given, seconds_dtype),
        shape=(rows, width),
        flags={name: _as_flag(name, given[name]) for name in _FLAGS if name in given},
    )


def _as_media(spec: MRopeSpec, given: Columns, seconds_dtype: npt.DTypeLike) -> dict[str, Media]:
    """Collect by modality what the columns of a batch mean; without what the family ignores."""
    merge, row, timed = spec.spatial_merge_size, spec.family_row, spec.tokens_per_second is not None
    if row.merges is not None:
        merge = _merge_of_mode(row.merges, given, merge)
    fields: dict[str, NewColumns] = {}
    for name, values in given.items():
        column = COLUMNS[name]
        if column.means is None:
            continue
        of = fields.setdefault(str(column.modality), {"merge": merge})
        if column.means == "size":
            of["size_N3"], of["name"] = _as_sizes(name, column.sides, values), name
        elif column.means == "count":
            of["count_B"] = as_integers(name, values, "how many grids each row has")
        elif column.means == "kept":
            of["kept"] = as_array(name, values, "a bool for each token of the clips") != 0
        elif column.means == "seconds":
            # Whatever the family, as readers of rows do.
            refuse_half_precision(name, values)
            is_array = isinstance(values, np.ndarray)
            seconds = values if is_array else as_array(name, values, "seconds of each video")
            if timed or name in row.inputs:
                of["seconds_N"], of["seconds_dtype"] = seconds, seconds_dtype
    if _IN_BATCH.isdisjoint(row.inputs):
        return _NO_MEDIA | {modality: Media(**of) for modality, of in fields.items()}
    merged = {modality: _merged(modality, of, given) for modality, of in fields.items()}
    return _NO_MEDIA | {modality: Media(**of) for modality, of in merged.items()}


def _merge_of_mode(merges: Mapping[str, int], given: Columns, merge: int) -> int:
    """Return the patches along each side that share a token, as the batch's mode says."""
    for mode in _MODES:
        if mode in given:
            if given[mode] not in merges:
                raise MRopeError(f"{mode} must be one of {', '.join(merges)}, not {given[mode]!r}")
            return merges[given[mode]]
    return merge


def _merged(modality: str, of: NewColumns, given: Columns) -> NewColumns:
    """Add the merge size that stands in the batch: one for all images, and one for all clips.

    Raises:
        MRopeError: no merge size in the batch, or more than one.
    """
    for name in _MERGES[modality]:
        if len(of.get("size_N3", ())):
            sizes = np.unique(as_integers(name, given.get(name, ()), "merge sizes"))
            if len(sizes) != 1 or sizes[0] < 1:
                raise MRopeError(
                    f"{name} must hold one size, the same for every {modality}, not "
                    f"{sizes.tolist()}"
                )
            of["merge"] = int(sizes[0])
    return of


def _as_flag(name: str, value: Any) -> BoolArray:
    flags = as_array(name, value, "one bool for the batch, or one for each clip")
    if flags.dtype.kind != "b":
        raise MRopeError(f"{name} must be one bool for the whole batch, not {flags.tolist()}")
    return flags


def _as_sizes(name: str, sides: int, values: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Return sizes as int64 (N, 3), with N = 0 for whatever is empty."""
    array = values if type(values) is np.ndarray else as_array(name, values, _HINTS[sides])
    if not array.size:
        return _NO_SIZES
    if sides == 3:
        if array.ndim > 2:
            refuse_stacked_grids(name, array.ndim, array)
        return as_grid(name, array)
    sizes = as_integers(name, array, _HINTS[sides]).astype(np.int64)
    if sides == 2:
        if sizes.ndim != 2 or sizes.shape[1] != 2:
            raise MRopeError(f"{name} must have shape (N, 2), not {sizes.shape}")
        return np.insert(sizes, 0, 1, axis=1)
    if sizes.ndim != 1:
        raise MRopeError(f"{name} must have shape (audios,), not {sizes.shape}")
    return np.stack((sizes, np.ones_like(sizes), np.ones_like(sizes)), axis=1)


def reads_types(spec: MRopeSpec) -> bool:
    """Whether `mm_token_type_ids` of a batch have to agree with its tokens.

    The Omni thinkers and GLM-Image find spans by markers, and their processors write other types.
    """
    row = spec.family_row
    return row.custom_index is None or "mm_token_type_ids" in row.inputs


def length_error(name: str, found: tuple[int, ...], ids: tuple[int, ...]) -> MRopeError:
    """Return the error for a token column of another shape than `input_ids`."""
    cause = ""
    if found and ids and found[:-1] == ids[:-1]:
        what = "one of them was truncated or padded without the other"
        if abs(found[-1] - ids[-1]) == 1:
            what = (
                "a token, such as EOS, was added to or removed from one of them, or one was shifted"
            )
        cause = f". Likely cause: {what}."
    if name == "labels":
        return MRopeError(f"{found[-1]} labels, but {ids[-1]} input_ids{cause}")
    return MRopeError(f"{name} has shape {found}, but input_ids {ids}{cause}")


def refuse_stacked_grids(name: str, axes: int, value: Any) -> None:
    """Refuse grids that have an axis for the rows of the batch.

    Raises:
        MRopeError: grids of more than two axes.
    """
    if axes > 2:
        raise MRopeError(
            f"{name} must have shape (N, 3), not {(*np.shape(value),)}. Likely cause: the grids of "
            "several rows were stacked (torch.stack, default_collate); concatenate them on dim 0."
        )


def refuse_half_precision(name: str, value: object) -> None:
    """Refuse numbers that were rounded to half precision: frames would share positions.

    Whether or not a family reads them: readers of rows do not know the family.

    Raises:
        MRopeError: a tensor or array of float16 or bfloat16.
    """
    dtype = getattr(value, "dtype", None)
    if dtype is not None and dtype.itemsize == 2 and "float" in str(dtype):
        kind = str(dtype).removeprefix("torch.")
        raise MRopeError(f"{name} is {kind}, too coarse to number tokens by; keep it float32")


@lru_cache(maxsize=64)
def _known(family: str) -> frozenset[str]:
    """Return the arguments that a family reads, and those that every family may be given."""
    row = find_family(family)
    assert row is not None  # the spec has it
    packs = ("seq_lengths",) if row.custom_index is None or row.packs else ()
    return _FOR_ALL.union(row.inputs, packs)


def _as_valid(
    spec: MRopeSpec, attention_mask: npt.ArrayLike, shape: tuple[int, ...]
) -> BoolArray | None:
    """Return which tokens are valid, or None where all of them are."""
    mask = attention_mask
    if type(mask) is not np.ndarray:
        mask = as_array("attention_mask", mask, "a number for each token")
    if mask.shape != shape:
        raise length_error("attention_mask", mask.shape, shape)
    if mask.size == 0:
        return None
    custom = spec.family_row.custom_index is not None
    if mask.dtype.kind not in "biu":
        allowed = "hold 0 and 1 only, or be bool" if custom else "be bool or integers"
        raise MRopeError(f"attention_mask must {allowed}, not {mask.dtype}")
    least = mask.min()
    # Packed rows number their examples 1, 2, 3 ... in the mask. The references of families with a
    # custom index, and 4.57's, disagree about such values: valid, padding, or so many tokens.
    binary = custom or spec.conventions.binary_mask
    if binary and mask.dtype.kind != "b" and not 0 <= least <= mask.max() <= 1:
        raise MRopeError(
            f"attention_mask must hold 0 and 1 only for {spec.family} and {spec.reference}, "
            "which take no other value for valid"
        )
    # One fast reduction tells the usual case, a batch without padding.
    return None if least > 0 else mask != 0
