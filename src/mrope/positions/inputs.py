"""Check and type every argument of a batch that its position ids depend on, once.

Shape suffixes: B rows of the batch, S padded length, N images, clips or audios of a modality.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mrope.arrays import BoolArray, IntArray, as_array, as_grid, as_integers
from mrope.columns import COLUMNS, MODALITIES, columns, count_key
from mrope.errors import MRopeError
from mrope.spec.spec import MRopeSpec

SECONDS, *_OTHER_SECONDS = columns("item", means="seconds")
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


_NONE = Media()


class BatchInputs(NamedTuple):
    """A batch whose arguments were checked one by one: shapes, dtypes and values that stand alone.

    Whether they fit together (tokens and sizes, counts and rows) is checked where both are known:
    in `mrope.positions.rope_index.locate`, or in the family's own module.

    Attributes:
        input_ids: (B, S) integers.
        valid: (B, S) bool, False at padding; None where the batch has no padding.
        types: `mm_token_type_ids`, (B, S) integers, or None.
        seq_lengths: for each row the tokens of the examples that it holds; None: a row is one.
        media: by modality, "image", "video" and "audio"; absent where the batch has none.
        flags: `use_audio_in_video` of the Omni thinkers, a bool, or one for each clip.
    """

    input_ids: IntArray
    valid: BoolArray | None
    types: IntArray | None
    seq_lengths: Sequence[npt.ArrayLike] | npt.ArrayLike | None
    media: Mapping[str, Media]
    flags: Mapping[str, BoolArray]

    @property
    def shape(self) -> tuple[int, int]:
        """(B, S)."""
        return self.input_ids.shape[0], self.input_ids.shape[1]

    @property
    def has_grids(self) -> bool:
        """Whether the batch came with images or clips at all, be it without any row."""
        return any(self.of(modality).name for modality in ("image", "video"))

    def of(self, modality: str) -> Media:
        """Return the media of a modality; without sizes where the batch has none."""
        return self.media.get(modality, _NONE)


def check_inputs(
    spec: MRopeSpec, given: Mapping[str, Any], seconds_dtype: npt.DTypeLike = np.float32
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
    _refuse_unread(spec, given)
    ids = as_integers("input_ids", given["input_ids"], "token ids")
    if ids.ndim != 2:
        raise MRopeError(f"input_ids must have shape (B, S), not {ids.shape}")
    types = None
    if "mm_token_type_ids" in given and reads_types(spec):
        types = as_integers(
            "mm_token_type_ids", given["mm_token_type_ids"], "0 text, 1 image, 2 video"
        )
        if types.shape != ids.shape:
            raise length_error("mm_token_type_ids", types.shape, ids.shape)
    return BatchInputs(
        input_ids=ids,
        valid=_as_valid(spec, given.get("attention_mask"), ids.shape),
        types=types,
        seq_lengths=given.get("seq_lengths"),
        media=_as_media(spec, given, seconds_dtype),
        flags={name: _as_flag(name, given[name]) for name in _FLAGS if name in given},
    )


def _as_media(
    spec: MRopeSpec, given: Mapping[str, Any], seconds_dtype: npt.DTypeLike
) -> dict[str, Media]:
    """Collect by modality what the columns of a batch mean; without what the family ignores."""
    for mode in _MODES:
        known = spec.family_row.merges or {}
        if mode in given and given[mode] not in known:
            raise MRopeError(f"{mode} must be one of {', '.join(known)}, not {given[mode]!r}")
    fields: dict[str, dict[str, Any]] = {}
    for name, values in given.items():
        column = COLUMNS[name]
        if column.modality is None or column.means is None or not _reads(spec, name):
            continue
        of = fields.setdefault(column.modality, {})
        if column.means == "size":
            of |= {"size_N3": _as_sizes(name, values), "name": name}
        elif column.means == "seconds":
            seconds = as_array(name, values, "seconds of each video")
            of |= {"seconds_N": seconds, "seconds_dtype": seconds_dtype}
        elif column.means == "count":
            of["count_B"] = as_integers(name, values, "how many grids each row has")
        elif column.means == "kept":
            of["kept"] = as_array(name, values, "a bool for each token of the clips") != 0
    merges = {modality: _merge(spec, modality, of, given) for modality, of in fields.items()}
    return {modality: Media(**of, merge=merges[modality]) for modality, of in fields.items()}


def _reads(spec: MRopeSpec, name: str) -> bool:
    """Whether a family's position ids depend on a column of media."""
    timed = spec.tokens_per_second is not None or name in spec.family_row.inputs
    return COLUMNS[name].means != "seconds" or timed


def _merge(spec: MRopeSpec, modality: str, of: Mapping[str, Any], given: Mapping[str, Any]) -> int:
    """Return the patches along each side that share a token: of the config, or as the batch says.

    Raises:
        MRopeError: no merge size in the batch, or more than one.
    """
    row = spec.family_row
    for name in _MODES:
        if name in given and row.merges is not None:
            return row.merges[given[name]]
    for name in _MERGES[modality]:
        if name not in row.inputs or not len(of.get("size_N3", ())):
            continue
        sizes = np.unique(as_array(name, given.get(name, ()), "merge sizes"))
        if len(sizes) != 1 or sizes[0] < 1:
            raise MRopeError(
                f"{name} must hold one size, the same for every {modality}, not {sizes.tolist()}"
            )
        return int(sizes[0])
    return spec.spatial_merge_size


def _as_flag(name: str, value: Any) -> BoolArray:
    flags = as_array(name, value, "one bool for the batch, or one for each clip")
    if flags.dtype.kind != "b":
        raise MRopeError(f"{name} must be one bool for the whole batch, not {flags.tolist()}")
    return flags


def _as_sizes(name: str, values: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Return sizes as int64 (N, 3), with N = 0 for whatever is empty."""
    sides = COLUMNS[name].sides
    array = as_array(name, values, _HINTS[sides])
    if not array.size:
        return _NO_SIZES
    if sides == 3:
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


def _refuse_unread(spec: MRopeSpec, given: Mapping[str, Any]) -> None:
    """Refuse arguments that the family does not read."""
    row = spec.family_row
    known = _FOR_ALL.union(row.inputs)
    if row.custom_index is None or row.packs:
        known |= {"seq_lengths"}
    unread = sorted(name for name in given if name not in known)
    if unread:
        raise TypeError(f"rope_index takes no {', '.join(unread)} for {spec.family}")


def _as_valid(
    spec: MRopeSpec, attention_mask: npt.ArrayLike | None, shape: tuple[int, ...]
) -> BoolArray | None:
    """Return which tokens are valid, or None where all of them are."""
    if attention_mask is None:
        return None
    mask = as_array("attention_mask", attention_mask, "a number for each token")
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
