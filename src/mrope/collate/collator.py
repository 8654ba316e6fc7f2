"""The stage that a user plugs into a DataLoader."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from mrope.collate.layouts import CheckedBatch, Layout, to_batch_layout
from mrope.collate.packing import check_packing, flatten, refuse_packed, seq_lengths
from mrope.collate.padding import PaddingCollator
from mrope.collate.skip_bad import OnError, make_rejects
from mrope.errors import MRopeError
from mrope.positions.rope_index import rope_index
from mrope.positions.spans import token_kinds
from mrope.positions.stored import take_stored
from mrope.positions.stream import IMAGE, VIDEO, to_stream
from mrope.spec.spec import MRopeSpec
from mrope.towers.audio import AudioSpec, audio_tensors, padded_features
from mrope.towers.vision import VisionSpec, block_index, check_release, vision_tensors

Collate = Callable[[Any], Any]
Packing = Literal["flatten"]

_OPTIONAL = ("attention_mask", "image_grid_thw", "video_grid_thw", "mm_token_type_ids")
# transformers' processors and models do not agree on the name of the same numbers.
_SECONDS = ("second_per_grid_ts", "video_second_per_grid")
_SPLITS = {"cu_seqlens": "split_sizes", "cu_window_seqlens": "window_split_sizes"}
_PER_SAMPLE = {"image_grid_thw": "images_per_sample", "video_grid_thw": "videos_per_sample"}


class MRopeCollator:
    """Add `position_ids` and `rope_deltas` to the batch that another collate function makes.

    The collator runs wherever the DataLoader runs it, holds plain data only, pickles, and needs no
    model and no transformers. What it adds is equal to what the model would compute for itself, in
    the release that the spec names, so that the model's forward only reads it.

    Args:
        inner_collate: any collate function that returns a mutable mapping with `input_ids` (B, S):
            a dict, `BatchEncoding` or `BatchFeature`. None: `PaddingCollator()`.
        spec: the model's numbers and the reference to follow.
        vision: the vision tower's numbers, to attach its tensors too; None: positions only.
        audio: the audio tower's numbers, to attach its tensors too, for batches with
            `feature_attention_mask` (Omni thinkers).
        packing: "flatten" brings the examples of a batch into one row without padding; see
            `mrope.collate.packing.flatten` for what is in such a batch.
        layout: "model", `position_ids` (3|4, B, S), as models take them; "batch", (B, 3|4, S), for
            what cuts or joins batches on dim 0; see `mrope.collate.layouts`.
        pad_to_multiple_of: a flattened row is filled up to a multiple of this, by a segment of its
            own. Padded batches: the inner collate function has a say in that.
        pad_token_id: token id of that segment.
        on_error: "skip" drops the examples that cannot be collated, and collates the others as if
            they alone had been given; "raise" does not.
        rejects: JSON-lines file that gets a line for each dropped example.
        max_rejects: stop when a process has dropped more: a count, or a share (a float below 1) of
            its examples from the hundredth on. None: never.
        count_key: key of the batch that gets the number of examples dropped from it.
        stand_in: good examples, for a batch with nothing left before the first good one; see
            `mrope.collate.skip_bad.Rejects`. It and the three before it belong to "skip".

    Raises:
        TypeError: an argument of another kind.
        ValueError: an argument of another value.
        OSError: `rejects` cannot be written.
        MRopeError: `vision` is given, and the installed transformers would not read its tensors;
            "flatten" with a model whose examples would see each other.

    Example:
        >>> from mrope.spec.spec import example_config
        >>> collate = MRopeCollator(None, MRopeSpec.from_config(
        ...     example_config("qwen3_vl"), "transformers-5.23"))
        >>> batch = collate([{"input_ids": [7, 8, 9]}, {"input_ids": [7]}])
        >>> tuple(batch["position_ids"].shape), batch["rope_deltas"].tolist()
        ((3, 2, 3), [[0], [0]])
    """

    def __init__(
        self,
        inner_collate: Collate | None,
        spec: MRopeSpec,
        vision: VisionSpec | None = None,
        *,
        audio: AudioSpec | None = None,
        packing: Packing | None = None,
        layout: Layout = "model",
        pad_to_multiple_of: int = 1,
        pad_token_id: int = 0,
        on_error: OnError = "raise",
        rejects: str | os.PathLike[str] | None = None,
        max_rejects: float | None = None,
        count_key: str | None = None,
        stand_in: Sequence[Any] | None = None,
    ) -> None:
        if not isinstance(spec, MRopeSpec):
            raise TypeError(f"spec must be an MRopeSpec, not {type(spec).__name__}")
        if inner_collate is not None and not callable(inner_collate):
            raise TypeError(f"inner_collate must be callable, not {type(inner_collate).__name__}")
        self.inner_collate = PaddingCollator() if inner_collate is None else inner_collate
        if vision is not None:
            check_release(vision)
        if audio is not None:
            audio.check_release()
        _require("packing", packing, (None, *get_args(Packing)))
        _require("layout", layout, get_args(Layout))
        _require("on_error", on_error, get_args(OnError))
        if packing is None and pad_to_multiple_of != 1:
            raise ValueError("pad_to_multiple_of belongs to packing='flatten'")
        if pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be at least 1, not {pad_to_multiple_of}")
        if pad_token_id in (spec.image_token_id, spec.video_token_id):
            raise ValueError(f"pad_token_id {pad_token_id} is a placeholder of images or videos")
        if packing is not None:
            check_packing(spec)
        self.spec = spec
        self.vision = vision
        self.audio = audio
        self.packing = packing
        self.layout = layout
        self.pad_to_multiple_of = pad_to_multiple_of
        self.pad_token_id = pad_token_id
        self.rejects = make_rejects(on_error, rejects, max_rejects, count_key, stand_in)

    def __call__(self, examples: Any) -> Any:
        """Collate `examples` and attach the positions of the batch.

        Args:
            examples: what the inner collate function takes. Where it is a sequence of mappings that
                carry their own `image_grid_thw` and `video_grid_thw`, each row is checked on its
                own.

        Returns:
            The inner function's batch, with `position_ids` int64 (3, B, S) and `rope_deltas` int64
            (B, 1) added as torch tensors and no other key changed; a dict comes back as a
            `CheckedBatch`. With `packing="flatten"` the token columns are one row, `position_ids`
            (4, 1, T), and the borders are added, see `mrope.collate.packing.flatten`. With `vision`, also:

            - what `vision_tensors` returns for the images and for the videos, each under the
              tower's own name with `image_` or `video_` before it, as transformers' models take
              them;
            - for the reading model of `mrope.hf`: `image_scatter_index` int64 (features,), which of
              the B * S tokens each feature row goes to; `image_split_sizes` and
              `image_window_split_sizes`, lists of ints, the patches of each attention segment; the
              same for `video_`; and `has_padding`, a bool. For towers in raster order also
              `image_block_index` int64 (patches,), the order in which blocks are merged. With
              `audio`: `audio_scatter_index` and `audio_split_sizes` likewise.

        Raises:
            SpanMismatchError: placeholder tokens and grids do not fit together.
            MRopeError: the batch is not a mapping, has no `input_ids`, already has positions, or
                holds something else that `rope_index` refuses. With `on_error="skip"`: too many
                rejects, or nothing that could stand in for a batch with nothing left.
        """
        if self.rejects is None:
            return self._collate(examples)
        return self.rejects.collate(self._collate, examples)

    def _collate(self, examples: Any) -> Any:
        examples, stored = take_stored(self.spec, examples)
        batch = _as_batch(self.inner_collate(examples))
        arguments = _arguments(self.spec, batch, examples)
        if stored is not None:
            arguments["stored"] = stored
        if self.packing is None:
            refuse_packed(batch, examples, arguments["input_ids"].shape)
            position_ids, rope_deltas = rope_index(self.spec, **arguments)
            added: dict[str, Any] = {"position_ids": position_ids, "rope_deltas": rope_deltas}
        else:
            added = self._flatten(batch, examples, arguments)
        if self.vision is not None:
            added |= _tower_inputs(self.vision, arguments)
            added |= _reader_inputs(self.spec, self.vision, arguments, added)
        if self.audio is not None:
            added |= _audio_inputs(self.spec, self.audio, batch, arguments)
        for name, value in added.items():
            _refuse_second_source(batch, name)
            batch[name] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        if self.layout == "batch":
            batch.update(to_batch_layout(batch))
        return CheckedBatch(batch) if type(batch) is dict else batch

    def _flatten(
        self, batch: MutableMapping[str, Any], examples: Any, arguments: dict[str, Any]
    ) -> dict[str, Any]:
        """Bring `batch` into one row and return what is added; `arguments` are of that row then."""
        ids, mask = arguments["input_ids"], arguments.pop("attention_mask", None)
        lengths = seq_lengths(batch, examples, ids.shape, mask)
        position_ids, rope_deltas = rope_index(
            self.spec, **arguments, attention_mask=mask, seq_lengths=lengths
        )
        _refuse_second_source(batch, "position_ids")
        added = flatten(
            batch,
            position_ids,
            lengths,
            mask,
            pad_to_multiple_of=self.pad_to_multiple_of,
            pad_token_id=self.pad_token_id,
        )
        arguments["input_ids"] = batch["input_ids"].numpy()
        return added | {"rope_deltas": rope_deltas}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner_collate!r}, {self.spec!r})"


def _tower_inputs(vision: VisionSpec, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the towers take beside their pixels, under the models' own names."""
    return {
        f"{modality}_{name}": value
        for modality in (("image", "video") if vision.videos else ("image",))
        for name, value in vision_tensors(vision, arguments.get(f"{modality}_grid_thw")).items()
    }


def _reader_inputs(
    spec: MRopeSpec,
    vision: VisionSpec,
    arguments: Mapping[str, Any],
    tower_inputs: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what the reading model decides by: places, and facts that must stay on the host."""
    mask = arguments.get("attention_mask")
    valid = None if mask is None or np.all(mask) else np.asarray(mask, np.bool_)
    inputs: dict[str, Any] = {"has_padding": valid is not None}
    kind_T = token_kinds(spec, to_stream(arguments["input_ids"], valid))
    place_T = None if valid is None else valid.ravel().nonzero()[0]
    for modality, kind in (("image", IMAGE), ("video", VIDEO)):
        if f"{modality}_cu_seqlens" not in tower_inputs:
            continue
        index = (kind_T == kind).nonzero()[0]
        inputs[f"{modality}_scatter_index"] = index if place_T is None else place_T[index]
        for borders, sizes in _SPLITS.items():
            if f"{modality}_{borders}" in tower_inputs:
                lengths = np.diff(tower_inputs[f"{modality}_{borders}"])
                inputs[f"{modality}_{sizes}"] = lengths.tolist()
        if vision.raster:
            grid_thw = arguments[f"{modality}_grid_thw"]
            inputs[f"{modality}_block_index"] = block_index(grid_thw, vision.spatial_merge_size)
    return inputs


def _audio_inputs(
    spec: MRopeSpec, audio: AudioSpec, batch: Mapping[str, Any], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the audio tower takes, under the models' names, and what readers decide by."""
    tensors = audio_tensors(audio, arguments.get("audio_seqlens"))
    if not tensors:
        return {}
    inputs: dict[str, Any] = {f"audio_{name}": value for name, value in tensors.items()}
    inputs["audio_split_sizes"] = np.diff(inputs["audio_cu_seqlens"]).tolist()
    if batch.get("input_features") is not None:
        features = torch.as_tensor(batch["input_features"])
        inputs["audio_padded_feature"] = padded_features(
            audio, features, arguments["audio_seqlens"]
        )
    placeholder = arguments["input_ids"] == spec.extra["audio_token_id"]
    if arguments.get("attention_mask") is not None:
        placeholder &= np.asarray(arguments["attention_mask"], np.bool_)
    inputs["audio_scatter_index"] = placeholder.ravel().nonzero()[0]
    return inputs


def _as_batch(batch: Any) -> MutableMapping[str, Any]:
    if not isinstance(batch, MutableMapping) or "input_ids" not in batch:
        raise MRopeError(
            "the inner collate function must return a mapping with input_ids, "
            f"not {type(batch).__name__}{_keys(batch)}"
        )
    return batch


def _require(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, not {value!r}")


def _refuse_second_source(batch: Mapping[str, Any], name: str) -> None:
    if batch.get(name) is not None:
        raise MRopeError(
            f"the inner collate function already gave {name}; two sources of one tensor in one "
            "batch are a mistake: remove one"
        )


def _keys(batch: Any) -> str:
    return f" with {sorted(map(str, batch))}" if isinstance(batch, Mapping) else ""


def _arguments(spec: MRopeSpec, batch: Mapping[str, Any], examples: Any) -> dict[str, Any]:
    """Return the arguments of `rope_index` that the batch and its examples hold."""
    arguments: dict[str, Any] = {"input_ids": _ids(batch["input_ids"])}
    for name in spec.family_row.inputs:
        if batch.get(name) is not None:
            value = batch[name]
            arguments[name] = value if isinstance(value, (bool, str)) else _array(name, value)
    if (
        "audio_seqlens" in spec.family_row.inputs
        and batch.get("feature_attention_mask") is not None
    ):
        # The thinkers' forward takes lengths from this mask, whatever else it is given.
        mask = _array("feature_attention_mask", batch["feature_attention_mask"])
        arguments["audio_seqlens"] = mask.sum(axis=-1)
    for name in _OPTIONAL:
        if batch.get(name) is not None:
            arguments[name] = _array(name, batch[name])
    arguments |= _seconds(batch)
    for grid, counts in _PER_SAMPLE.items():
        if batch.get(counts) is not None:
            arguments[counts] = _array(counts, batch[counts])
        elif grid in arguments:
            arguments[counts] = _count(examples, grid, arguments)
    return arguments


def _ids(value: Any) -> npt.NDArray[Any]:
    ids = _array("input_ids", value)
    if ids.ndim != 2:
        raise MRopeError(f"input_ids must have shape (B, S), not {ids.shape}")
    return ids


def _array(name: str, value: Any) -> npt.NDArray[Any]:
    if not isinstance(value, torch.Tensor):
        return np.asarray(value) if isinstance(value, np.ndarray) else _array_of(name, value)
    if value.device.type != "cpu":
        raise MRopeError(f"{name} is on {value.device}: collate functions must return CPU tensors")
    if value.dtype == torch.bfloat16:
        raise MRopeError(f"{name} is bfloat16, too coarse to number tokens by; keep it float32")
    return value.detach().numpy()


def _array_of(name: str, value: Any) -> npt.NDArray[Any]:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise MRopeError(f"{name} is ragged: {error}") from error


def _seconds(batch: Mapping[str, Any]) -> dict[str, Any]:
    given = [name for name in _SECONDS if batch.get(name) is not None]
    if not given:
        return {}
    values = [_array(name, batch[name]) for name in given]
    if len(values) == 2 and not np.array_equal(values[0], values[1]):
        raise MRopeError(f"{given[0]} and {given[1]} are both in the batch and differ")
    value = batch[given[0]]
    wide = isinstance(value, torch.Tensor) and value.dtype == torch.float64
    return {"second_per_grid_ts": values[0]} | ({"seconds_dtype": np.float64} if wide else {})


def _count(examples: Any, grid: str, arguments: Mapping[str, Any]) -> npt.NDArray[np.int64] | None:
    """Return how many grids each example carries, if the batch's grids are theirs in that order.

    An inner function that makes, drops, merges or reorders samples gives other grids or rows; then
    the examples say nothing about rows, and the check over the whole batch stands.
    """
    if not isinstance(examples, Sequence) or len(examples) != len(arguments["input_ids"]):
        return None
    if not all(isinstance(example, Mapping) for example in examples):
        return None
    own = [example.get(grid) for example in examples]
    if all(value is None for value in own):
        return None
    try:
        grids = [_own_grid(value) for value in own]
    except (TypeError, ValueError, RuntimeError):
        return None
    if not np.array_equal(np.concatenate(grids), arguments[grid]):
        return None
    return np.array([len(value) for value in grids])


def _own_grid(value: Any) -> npt.NDArray[Any]:
    """Return one example's grids as (n, 3); an example may hold a single (3,) grid, or none."""
    return np.empty((0, 3), np.int64) if value is None else np.asarray(value).reshape(-1, 3)
