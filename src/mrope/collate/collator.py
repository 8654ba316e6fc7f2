"""`MRopeCollator`: the stage that a user plugs into a DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch

from mrope.arrays import Array
from mrope.collate.decoding import remind_of_rope_deltas
from mrope.collate.ladder import Shapes
from mrope.collate.layouts import CheckedBatch, Layout, to_batch_layout
from mrope.collate.options import resolve_option
from mrope.collate.packing import Flatten, OneRow, check_packing
from mrope.collate.padding import PaddingCollator
from mrope.collate.pixels import check_pixels
from mrope.collate.placement import Padded, Placement
from mrope.collate.read import Rows, as_batch, read_arguments
from mrope.collate.shapes import check_shapes, one_tower_call
from mrope.collate.skip_bad import BadExampleFilter, SkipBad
from mrope.collate.tower_columns import (
    EXPERT_TYPES,
    audio_columns,
    expert_columns,
    vision_columns,
)
from mrope.columns import Batch, Columns, NewColumns
from mrope.errors import MRopeError
from mrope.positions.inputs import check_inputs
from mrope.positions.located import Located
from mrope.positions.rope_index import compute, padding_of, rope_deltas
from mrope.spec.spec import MRopeSpec
from mrope.towers import AudioSpec, VisionSpec, check_release

Collate = Callable[[Any], Any]


class MRopeCollator:
    """Add `position_ids` and `rope_deltas` to the batch that another collate function makes.

    The collator runs wherever the DataLoader runs it, holds plain data only, pickles, and needs no
    model and no transformers. What it adds is equal to what the model would compute for itself, in
    the release that the spec names, so that the model's forward only reads it.

    To decode tokens from the cache of `model(**batch, use_cache=True)`, `import mrope.hf` first:
    otherwise an unmodified model ignores `rope_deltas`, and the next token's position is wrong.

    Args:
        inner_collate: any collate function that returns a mutable mapping with `input_ids` (B, S):
            a dict, `BatchEncoding` or `BatchFeature`. None: `PaddingCollator()`.
        spec: the model's numbers and the reference to follow.
        vision: the vision tower's numbers, to attach its tensors too; None: positions only.
        audio: the audio tower's numbers, to attach its tensors too, for batches with
            `feature_attention_mask` (Omni thinkers).
        packing: `Flatten(...)`, or "flatten" for its defaults: the examples of a batch become one
            row without padding; see `mrope.collate.packing.OneRow`. None: only the inner collate
            function pads.
        layout: "model", `position_ids` (3|4, B, S), as models take them; "batch", (B, 3|4, S), for
            code that splits or joins batches on dim 0; see `mrope.collate.layouts`.
        shapes: pad every tensor up to a rung of a short ladder, so that one compiled graph serves
            batches of all sizes; for attached models. See `Shapes`, or a mapping of its arguments.
        on_error: `SkipBad(...)`, or "skip" for its defaults: examples that cannot be collated are
            dropped, and the others collated as if they alone had been given. "raise": their error
            is raised.
        short_forms: fields of `Flatten` and `SkipBad`, beside "flatten" and "skip":
            `packing="flatten", pad_to_multiple_of=8` is `packing=Flatten(pad_to_multiple_of=8)`.

    Raises:
        TypeError: an argument of another kind.
        ValueError: an argument of another value.
        OSError: the folder of `SkipBad.rejects` cannot be written to.
        MRopeError: `vision` is given, and the installed transformers would not read its tensors;
            "flatten" with a model whose examples would attend to each other.

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
        packing: Literal["flatten"] | Flatten | None = None,
        layout: Layout = "model",
        shapes: Shapes | Columns | None = None,
        on_error: Literal["raise", "skip"] | SkipBad = "raise",
        **short_forms: object,
    ) -> None:
        if not isinstance(spec, MRopeSpec):
            raise TypeError(f"spec must be an MRopeSpec, not {type(spec).__name__}")
        if inner_collate is not None and not callable(inner_collate):
            raise TypeError(f"inner_collate must be callable, not {type(inner_collate).__name__}")
        if layout not in get_args(Layout):
            raise ValueError(f"layout must be one of 'model', 'batch', not {layout!r}")
        if isinstance(shapes, Mapping):
            shapes = Shapes(**shapes)
        _check_types(vision, audio, shapes)
        if vision is not None:
            check_release(vision)
        if audio is not None:
            audio.check_release()
        if inner_collate is None:
            inner_collate = PaddingCollator(join_pixels=shapes is None or not shapes.patches)
        self.inner_collate = inner_collate
        self.spec = spec
        self.vision = vision
        self.audio = audio
        self.packing = resolve_option("packing", Flatten, packing, "flatten", None, short_forms)
        if self.packing is not None:
            check_packing(spec, self.packing)
        if shapes is not None:
            check_shapes(spec, vision, shapes)
        self.shapes = shapes
        self.layout = layout
        self.on_error = resolve_option("on_error", SkipBad, on_error, "skip", "raise", short_forms)
        if short_forms:
            raise TypeError(f"MRopeCollator takes no {', '.join(short_forms)}")
        if self.packing is None:
            self._arrangement: Padded | OneRow = Padded(shapes)
        else:
            self._arrangement = OneRow(self.packing, shapes, spec.family_row.linear)
        self._filter = None if self.on_error is None else BadExampleFilter(self.on_error)

    def __call__(self, examples: object) -> Any:
        """Collate `examples` and add position ids, rope deltas and tower tensors to the batch.

        Args:
            examples: what the inner collate function takes. Where it is a sequence of mappings that
                carry their own `image_grid_thw` and `video_grid_thw`, each row is checked on its
                own.

        Returns:
            The inner function's batch, with `position_ids` int64 (3, B, S) and `rope_deltas` int64
            (B, 1) added as torch tensors and no other key changed; a dict comes back as a
            `CheckedBatch`. Families of `ONE_DIMENSIONAL` get `position_ids` (B, S) alone. With
            `packing`, the token columns are one row, `position_ids` (4, 1, T), in 1-D (1, T), and
            the borders are added, see `mrope.collate.packing.OneRow`. With
            `vision`, also:

            - what `vision_tensors` returns for the images and for the videos, each under the
              tower's own name with `image_` or `video_` before it, as transformers' models take
              them;
            - for attached models (`mrope.hf.attach`): `image_scatter_index` int64 (features,),
              which of the B * S tokens each feature row goes to; `image_split_sizes` and
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
        if self._filter is None:
            return self._collate(examples)
        return self._filter.collate(self._collate, examples)

    def _collate(self, examples: Any) -> Any:
        batch = as_batch(self.inner_collate(examples))
        rows = Rows(examples, batch["input_ids"])
        given = read_arguments(self.spec, batch, rows, self._arrangement.apart)
        inputs = check_inputs(self.spec, *given)
        located, positions_AT, end_D = compute(self.spec, inputs)
        check_pixels(self.spec, batch, rows, inputs)
        placement = self._arrangement.place(located)
        added = self._arrangement.lay_out(batch, located, placement)
        added |= self._positions(batch, located, placement, positions_AT, end_D)
        added |= self._tower_columns(batch, located, placement)
        return self._finished(batch, added)

    def _positions(
        self,
        batch: Columns,
        located: Located,
        placement: Placement,
        positions_AT: Array,
        end_D: Array,
    ) -> NewColumns:
        if self.spec.family_row.one_dimensional:
            # Such a model has no use for deltas.
            return {"position_ids": self._arrangement.count(located, placement)}
        padded = placement.place_T is not None
        fill = padding_of(self.spec, located.inputs).fill if padded else 0
        positions = self._arrangement.position_ids(positions_AT, fill, located, placement)
        deltas = rope_deltas(self.spec, located, end_D, self._arrangement.apart)
        if batch.get("labels") is None:
            remind_of_rope_deltas(deltas)
        added = {"position_ids": positions}
        return added | {"rope_deltas": deltas} if self._arrangement.has_deltas else added

    def _tower_columns(self, batch: Batch, located: Located, placement: Placement) -> NewColumns:
        added: NewColumns = {}
        if self.audio is not None:
            added |= audio_columns(self.spec, self.audio, batch, located, placement)
        if self.vision is None:
            return added
        if self.shapes is not None and self.shapes.patches:
            return added | one_tower_call(self.vision, located, batch, self.shapes, placement)
        added["has_padding"] = placement.gaps
        added["padded_behind"] = placement.behind
        for modality in ("image", "video"):
            added |= vision_columns(self.vision, modality, located, placement)
        if batch.get(EXPERT_TYPES) is not None:
            added |= expert_columns(batch, placement)
        return added

    def _finished(self, batch: Batch, added: Columns) -> Any:
        for name, value in added.items():
            if batch.get(name) is not None:
                raise MRopeError(
                    f"the inner collate function already gave {name}; two sources of one tensor in "
                    "one batch are a mistake: remove one"
                )
            batch[name] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        if self.layout == "batch":
            batch.update(to_batch_layout(batch))
        if type(batch) is not dict:
            return batch
        # Not by its constructor, whose checks are for code that makes a batch of this one.
        checked = CheckedBatch.__new__(CheckedBatch)
        checked.update(batch)
        return checked

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner_collate!r}, {self.spec!r})"


def _check_types(vision: object, audio: object, shapes: object) -> None:
    """Raise for an option of another type, such as a model's config."""
    kinds = {
        "vision": (vision, VisionSpec),
        "audio": (audio, AudioSpec),
        "shapes": (shapes, Shapes),
    }
    for name, (value, kind) in kinds.items():
        if not (value is None or isinstance(value, kind)):
            raise TypeError(f"{name} must be of type {kind.__name__}, not {type(value).__name__}")
