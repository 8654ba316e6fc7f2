"""Forwards that take everything from the batch, and so never wait for the device.

Each stands in for the `forward` of a transformers base model (the module that holds `visual` and
`language_model`), for batches of a `MRopeCollator` with vision tensors. `mrope.hf.attach` puts them
on an instance. What they do is what transformers does, with the same operations in the same order
wherever that is possible; what differs is where a decision is made:

- Features go to their tokens by index (`image_scatter_index`); transformers compresses a mask.
- The tower attends within segments whose lengths are host ints (`image_split_sizes`), and takes
  equal ones together; transformers reads `cu_seqlens` back, three times a layer, and loops.
- The attention mask is decided by a host bool (`has_padding`); transformers reduces the mask.
- Tokens and features were counted in the worker; transformers counts them again.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function
from transformers.utils import can_return_tuple

from mrope.collate.layouts import to_model_layout
from mrope.errors import MRopeError
from mrope.hf.attention import as_runs, is_flash
from mrope.towers.vision import READ_SINCE

Tensors = MutableMapping[str, Any]


Encode = Callable[[Any, str, Tensors], tuple[torch.Tensor, Any]]


_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


@can_return_tuple  # type: ignore[untyped-decorator]
def read_flat(self: Any, **inputs: Any) -> Any:
    """Forward of Qwen2-VL, Qwen2.5-VL and Qwen3.5: features of one level, put where they belong."""
    return read(self, inputs, _encode)


def read(self: Any, inputs: Tensors, encode: Encode) -> Any:
    """Put features of one level where they belong, and run the text model.

    Args:
        encode: runs the tower on a modality's pixels; returns where its features go, and its output
            with the features in `pooler_output`. Takes from `inputs` what it uses.
    """
    inputs = to_model_layout(inputs)
    if not _is_precomputed(self, inputs):
        return type(self).forward(self, **inputs)
    embeds = token_embeddings(self, inputs)
    for modality in _given(inputs):
        index, features = encode(self, modality, inputs)
        embeds = put(embeds, index, features.pooler_output)
    return _decode(self, embeds, inputs)


@can_return_tuple  # type: ignore[untyped-decorator]
def read_frames(self: Any, **inputs: Any) -> Any:
    """Forward of GLM-4.1V to GLM-4.6V, whose tower counts with its borders on the device."""
    return read(self, inputs, _encode_frames)


@can_return_tuple  # type: ignore[untyped-decorator]
def read_raster(self: Any, **inputs: Any) -> Any:
    """Forward of PaddleOCR-VL, whose projector merges patches image by image."""
    return read(self, inputs, _encode_raster)


@can_return_tuple  # type: ignore[untyped-decorator]
def read_deepstack(self: Any, **inputs: Any) -> Any:
    """Forward of Qwen3-VL: the same, and deeper features are added to the first layers' outputs."""
    inputs = to_model_layout(inputs)
    if not _is_precomputed(self, inputs):
        return type(self).forward(self, **inputs)
    embeds = token_embeddings(self, inputs)
    indices, levels = [], []
    for modality in _given(inputs):
        index, features = _encode(self, modality, inputs)
        embeds = put(embeds, index, features.pooler_output)
        indices.append(index)
        levels.append(features.deepstack_features)
    if indices:
        # The text model hands both to `_deepstack_process`, which `add_by_index` stands in for.
        inputs["visual_pos_masks"] = torch.cat(indices)
        inputs["deepstack_visual_embeds"] = [
            torch.cat(level) for level in zip(*levels, strict=True)
        ]
    return _decode(self, embeds, inputs)


def add_by_index(
    self: Any, hidden_states: torch.Tensor, index: torch.Tensor, features: torch.Tensor
) -> torch.Tensor:
    """Add feature rows to the tokens at flat indices; stands in for `_deepstack_process`.

    Args:
        index: (N,) int64 places among the B * S tokens; a boolean mask, which the model's own
            forward gives, goes to the model's own method.
    """
    if index.dtype == torch.bool:
        own = type(self)._deepstack_process  # noqa: SLF001 - the method that this one stands in for
        result: torch.Tensor = own(self, hidden_states, index, features)
        return result
    flat = hidden_states.flatten(0, 1)
    return flat.index_add(0, index, features.to(flat.dtype)).view_as(hidden_states)


def _is_precomputed(self: Any, inputs: Tensors) -> bool:
    """Whether the batch carries what the reading needs; raises where it should and does not."""
    modalities = _given(inputs)
    missing = [
        name
        for modality in modalities
        for name in (f"{modality}_scatter_index", f"{modality}_split_sizes")
        if inputs.get(name) is None
    ]
    if inputs.get("has_padding") is not None and not missing:
        if inputs.get("position_ids") is None:
            raise MRopeError("the batch has vision tensors of a MRopeCollator, but no position_ids")
        return True
    # `generate` computes positions for itself and prefills with a cache: it may take the slow way.
    generating = (
        inputs.get("past_key_values") is not None and inputs.get("position_ids") is not None
    )
    if modalities and self.mrope_strict and not generating:
        wanted = "position_ids" if inputs.get("position_ids") is None else ", ".join(missing)
        raise MRopeError(
            f"an attached model got {' and '.join(modalities)} pixels without {wanted}: let a "
            "MRopeCollator with vision=VisionSpec(...) make the batch (rope.vision: true), or "
            "attach(model, strict=False) to let the model compute for itself"
        )
    return False


def _given(inputs: Tensors) -> list[str]:
    return [modality for modality, pixels in _PIXELS.items() if inputs.get(pixels) is not None]


def token_embeddings(self: Any, inputs: Tensors) -> torch.Tensor:
    """Take ids or embeddings from `inputs`, and return embeddings (B, S, hidden)."""
    embeds = inputs.pop("inputs_embeds", None)
    input_ids = inputs.pop("input_ids", None)
    if (input_ids is None) == (embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    result: torch.Tensor = self.get_input_embeddings()(input_ids) if embeds is None else embeds
    return result


def _encode(self: Any, modality: str, inputs: Tensors) -> tuple[torch.Tensor, Any]:
    """Run the tower on one modality's pixels; return where the features go, and its output."""
    index, pixels, grid_thw, known = _tower_inputs(self, modality, inputs)
    return index, self.visual(pixels, grid_thw=grid_thw, return_dict=True, **known)


def _encode_frames(self: Any, modality: str, inputs: Tensors) -> tuple[torch.Tensor, Any]:
    """Do the same for a tower that counts with `cu_seqlens`, and takes a grid for each frame."""
    borders = inputs[f"{modality}_cu_seqlens"]
    frames = len(inputs[f"{modality}_split_sizes"])
    index, pixels, grid_thw, known = _tower_inputs(self, modality, inputs)
    if not isinstance(known["cu_seqlens"], torch.Tensor):
        known |= {"cu_seqlens": borders, "segments": known["cu_seqlens"]}
    if frames != len(grid_thw):
        # With their number on the host, torch does not wait to learn it.
        rows = torch.repeat_interleave(grid_thw, grid_thw[:, 0], dim=0, output_size=frames)
        grid_thw = torch.cat((torch.ones_like(rows[:, :1]), rows[:, 1:]), dim=1)
    return index, self.visual(pixels, grid_thw=grid_thw, return_dict=True, **known)


def _encode_raster(self: Any, modality: str, inputs: Tensors) -> tuple[torch.Tensor, Any]:
    """Do the same, and merge all images' patches at once, by the index of their blocks."""
    blocks = inputs.pop(f"{modality}_block_index")
    index, pixels, grid_thw, known = _tower_inputs(self, modality, inputs)
    output = self.visual(pixels[None], grid_thw=grid_thw, return_dict=True, **known)
    projector = self.projector
    patches = projector.pre_norm(output.last_hidden_state).index_select(0, blocks)
    across, down = projector.merge_kernel_size
    merged = projector.linear_1(patches.reshape(-1, across * down * patches.shape[-1]))
    output.pooler_output = projector.linear_2(projector.act(merged))
    return index, output


def _tower_inputs(
    self: Any, modality: str, inputs: Tensors
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Take from `inputs` where features go, pixels, grids, and what else the tower takes."""
    pixels = inputs.pop(_PIXELS[modality]).type(self.visual.dtype)
    index = inputs.pop(f"{modality}_scatter_index")
    known = {name: inputs.pop(f"{modality}_{name}", None) for name in READ_SINCE}
    known = {name: value for name, value in known.items() if value is not None}
    splits = {
        "cu_seqlens": inputs.pop(f"{modality}_split_sizes"),
        "cu_window_seqlens": inputs.pop(f"{modality}_window_split_sizes", None),
    }
    if not is_flash(self.visual.config):
        # The tower hands these on to its attention, where `attend_segments` knows them.
        for name, sizes in splits.items():
            if sizes is not None:
                known[name] = as_runs(sizes)
    return index, pixels, inputs.pop(f"{modality}_grid_thw"), known


def put(embeds: torch.Tensor, index: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Replace the tokens at flat indices by feature rows; backward needs no mask either."""
    features = features.to(embeds.device, embeds.dtype)
    return embeds.flatten(0, 1).index_copy(0, index, features).view_as(embeds)


def _decode(self: Any, embeds: torch.Tensor, inputs: Tensors) -> Any:
    deltas = inputs.pop("rope_deltas", None)
    if deltas is not None:
        self.rope_deltas = deltas  # where transformers' generate looks for it
    mask = inputs.pop("attention_mask", None)
    if inputs.get("segment_sizes") is not None:
        mask = _packed_mask(self, embeds, inputs)
    elif not isinstance(mask, dict):
        mask = _causal_mask(self, embeds, mask if inputs["has_padding"] else None, inputs)
    for name in ("has_padding", "mm_token_type_ids", "second_per_grid_ts", "mm_encoder_outputs"):
        inputs.pop(name, None)
    return self.language_model(input_ids=None, inputs_embeds=embeds, attention_mask=mask, **inputs)


def _causal_mask(
    self: Any, embeds: torch.Tensor, padding_mask: torch.Tensor | None, inputs: Tensors
) -> Any:
    """Return the mask that the text model would build, without asking the device what it holds.

    None where there is no padding: the attention kernel's own causal mode. With padding a mask that
    is made on the device, (B, 1, S, S); flash attention takes the 2-D one and waits to unpad it.
    """
    if padding_mask is None or padding_mask.ndim != 2:
        return padding_mask
    config = self.language_model.config
    if is_flash(config):
        return padding_mask
    cache = inputs.get("past_key_values")
    full = create_causal_mask(config, embeds, padding_mask, cache, allow_is_causal_skip=False)
    if "linear_attention" not in (getattr(config, "layer_types", None) or ()):
        return full
    # Linear layers multiply their input by the 2-D mask; transformers first asks whether it is all
    # 1.
    return {"full_attention": full, "linear_attention": padding_mask.contiguous()}


def _packed_mask(self: Any, embeds: torch.Tensor, inputs: Tensors) -> Any:
    """Return the mask of one row of segments, and take from `inputs` what would make models wait.

    The text row of the positions and `seq_idx` say where segments are; transformers looks for jumps
    in the first, which waits. Here the mask is made from the second, on the device. Flash attention
    takes `cu_seq_lens_q` and no mask.
    """
    config = self.language_model.config
    seq_idx = inputs.pop("seq_idx")
    inputs["position_ids"] = inputs["position_ids"][-3:]
    if is_flash(config):
        full = None
    else:
        full = create_causal_mask(
            config, embeds, None, None, and_mask_function=packed_sequence_mask_function(seq_idx)
        )
    if "linear_attention" not in (getattr(config, "layer_types", None) or ()):
        inputs.pop("segment_sizes")
        return full
    return {"full_attention": full, "linear_attention": None}


# The Omni thinkers' stand in `mrope.hf.omni_forwards`.
READERS: dict[str, Callable[..., Any]] = {
    "qwen2_vl": read_flat,
    "qwen2_5_vl": read_flat,
    "qwen3_vl": read_deepstack,
    "qwen3_vl_moe": read_deepstack,
    "qwen3_5": read_flat,
    "qwen3_5_moe": read_flat,
    "glm4v": read_frames,
    "glm4v_moe": read_frames,
    "glm46v": read_frames,
    "paddleocr_vl": read_raster,
}
