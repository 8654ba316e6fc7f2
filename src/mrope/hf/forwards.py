"""Forwards that take everything from the batch, and so never sync with the device.

Each replaces the `forward` of a transformers base model (the module that holds `visual` and
`language_model`), for batches of a `MRopeCollator` with vision tensors. `mrope.hf.attach` binds
them to an instance. They run transformers' operations in transformers' order wherever possible.
What differs is where a decision is made:

- Features go to their tokens by index (`image_scatter_index`); transformers compresses a mask.
- Towers attend within segments whose lengths are host ints (`image_split_sizes`), and equal ones
  together; transformers reads `cu_seqlens` back, three times a layer, and loops.
- A host bool (`has_padding`) decides the attention mask; transformers reduces the mask.
- The worker matched placeholders and features; transformers counts both again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from transformers.utils import can_return_tuple

from mrope.collate.layouts import to_model_layout
from mrope.errors import MRopeError
from mrope.hf.attention import ONLY_CAUSAL, causal_mask, packed_mask, tower_borders
from mrope.hf.outputs import own_output
from mrope.spec.references import VISION_READ_SINCE

Tensors = MutableMapping[str, Any]

# Images and clips of a batch of fixed shapes are one modality, "vision": they share a tower call.
PIXELS = {
    "image": "pixel_values",
    "video": "pixel_values_videos",
    "vision": "pixel_values",
}


# Where base models hold their vision tower.
VISION_TOWERS = ("visual", "vision_tower", "vision_model")


class Gather(NamedTuple):
    """Where features go, by token: a batch of fixed shapes has rows of features to leave out.

    Attributes:
        row: int64 (B * S,), the feature row of each token; any row where the token takes none.
        mask: bool (B, S), which tokens take one.
    """

    row: torch.Tensor
    mask: torch.Tensor

    def rows_of(self, features: torch.Tensor) -> torch.Tensor:
        """Return the feature row of each token, (B, S, hidden)."""
        return features.index_select(0, self.row).view(*self.mask.shape, features.shape[-1])


Places = torch.Tensor | Gather
Encode = Callable[[Any, str, Tensors], tuple[Places, Any]]

# Keywords of a tower with borders: the borders, their longest segment, and the lengths on the host.
_BORDERS = (
    ("cu_seqlens", "max_seqlen", "split_sizes"),
    ("cu_window_seqlens", "max_window_seqlen", "window_split_sizes"),
)


@can_return_tuple  # type: ignore[untyped-decorator]
def flat_forward(self: Any, **inputs: Any) -> Any:
    """Forward of Qwen2-VL, Qwen2.5-VL, Qwen3.5 and GLM-OCR: features of one level."""
    return forward_with(self, inputs, _encode)


@can_return_tuple  # type: ignore[untyped-decorator]
def ngram_forward(self: Any, **inputs: Any) -> Any:
    """Forward of Qwen4-Exp: its layers embed n-grams of token ids too."""
    if self.config.text_config.ple_layer_ids:
        if inputs.get("seq_idx") is not None:
            raise MRopeError(
                "packing='flatten' is not supported for qwen4_exp with ple_layer_ids: n-grams of "
                "token ids, and a convolution over them, cross the borders of examples; pad the "
                "batches instead"
            )
        # Without them the text model would search its embeddings for the ids: a sync.
        inputs.setdefault("ple_input_ids", inputs.get("input_ids"))
    return forward_with(self, inputs, _encode)


@can_return_tuple  # type: ignore[untyped-decorator]
def frames_forward(self: Any, **inputs: Any) -> Any:
    """Forward of GLM-4.1V to GLM-4.6V: the tower takes a grid for each frame."""
    return forward_with(self, inputs, _encode_frames)


@can_return_tuple  # type: ignore[untyped-decorator]
def raster_forward(self: Any, **inputs: Any) -> Any:
    """Forward of PaddleOCR-VL: patches are in raster order, and the projector merges them."""
    return forward_with(self, inputs, _encode_raster)


@can_return_tuple  # type: ignore[untyped-decorator]
def deepstack_forward(self: Any, **inputs: Any) -> Any:
    """Forward of Qwen3-VL and its kin: deeper features are added to the first text layers."""
    inputs = to_model_layout(inputs)
    if not is_precomputed(self, inputs):
        return type(self).forward(self, **inputs)
    embeds = token_embeddings(self, inputs)
    indices: list[Any] = []
    levels, encoded = [], {}
    for modality in modalities_of(inputs):
        index, features = _encode(self, modality, inputs)
        embeds = scatter_features(embeds, index, features.pooler_output)
        encoded[modality] = features
        indices.append(index)
        levels.append(features.deepstack_features)
    if indices:
        # The text model passes both on to `_deepstack_process` unread, so that an index can take
        # the place of the mask: `add_deepstack` replaces that method.
        inputs["visual_pos_masks"] = indices[0] if len(indices) == 1 else torch.cat(indices)
        inputs["deepstack_visual_embeds"] = [
            torch.cat(level) for level in zip(*levels, strict=True)
        ]
    return run_text_model(self, embeds, inputs, encoded)


def forward_with(self: Any, inputs: Tensors, encode: Encode) -> Any:
    """Run a base model whose features are of one level: towers first, then the text model.

    Args:
        encode: runs the tower on a modality's pixels; returns the scatter index, and the tower's
            output with the features in `pooler_output`. Removes from `inputs` what it uses.
    """
    inputs = to_model_layout(inputs)
    if not is_precomputed(self, inputs):
        return type(self).forward(self, **inputs)
    embeds = token_embeddings(self, inputs)
    encoded = {}
    for modality in modalities_of(inputs):
        index, encoded[modality] = encode(self, modality, inputs)
        embeds = scatter_features(embeds, index, encoded[modality].pooler_output)
    return run_text_model(self, embeds, inputs, encoded)


def add_deepstack(
    self: Any, hidden_states: torch.Tensor, index: Places, features: torch.Tensor
) -> torch.Tensor:
    """Add feature rows to the tokens at flat indices; replaces `_deepstack_process`.

    Args:
        hidden_states: (B, S, hidden).
        index: (N,) int64, into the B * S tokens, or a `Gather`. A boolean mask, which the model's
            own forward gives, is passed to the model's own method.
        features: (N, hidden).
    """
    if isinstance(index, Gather):
        added = index.rows_of(features.to(hidden_states.dtype))
        return torch.where(index.mask[..., None], hidden_states + added, hidden_states)
    if index.dtype == torch.bool:
        own = type(self)._deepstack_process  # noqa: SLF001 - the method that this one replaces
        result: torch.Tensor = own(self, hidden_states, index, features)
        return result
    # Reading and writing at a mask syncs twice at each level, and again in the backward.
    flat = hidden_states.flatten(0, 1)
    return flat.index_add(0, index, features.to(flat.dtype)).view_as(hidden_states)


def is_precomputed(self: Any, inputs: Tensors) -> bool:
    """Return whether the batch has what an attached forward needs.

    Raises:
        MRopeError: it does not, and the model is strict; or it has vision tensors alone.
    """
    modalities = modalities_of(inputs)
    missing = [
        name for modality in modalities for name in _needed(modality) if inputs.get(name) is None
    ]
    # The collator adds `has_padding` to every batch, also to one of text alone.
    if inputs.get("has_padding") is not None and not missing:
        if inputs.get("position_ids") is None:
            raise MRopeError("the batch has vision tensors of a MRopeCollator, but no position_ids")
        return True
    # `generate` computes position ids and prefills with a cache: its batches come from no collator.
    generating = cache_of(inputs) is not None and inputs.get("position_ids") is not None
    if modalities and self.mrope_strict and not generating:
        wanted = "position_ids" if inputs.get("position_ids") is None else ", ".join(missing)
        raise MRopeError(
            f"an attached model got {' and '.join(modalities)} pixels without {wanted}: let a "
            "MRopeCollator with vision=VisionSpec(...) make the batch (rope.vision: true), or "
            "attach(model, strict=False) to let the model compute for itself"
        )
    return False


def cache_of(inputs: Tensors) -> Any:
    """Return the key-value cache, or None."""
    # transformers 5.24 renamed the argument, and takes the old name until 5.40.
    cache = inputs.get("cache")
    return inputs.get("past_key_values") if cache is None else cache


def modalities_of(inputs: Tensors) -> list[str]:
    """Return what the batch has pixels of."""
    if inputs.get("vision_feature_index") is not None:
        return ["vision"]
    return [name for name in ("image", "video") if inputs.get(PIXELS[name]) is not None]


def _needed(modality: str) -> tuple[str, ...]:
    if modality == "vision":
        return ("vision_feature_index", "vision_feature_mask", "vision_cu_seqlens", "has_padding")
    return (f"{modality}_scatter_index", f"{modality}_split_sizes")


def token_embeddings(self: Any, inputs: Tensors) -> torch.Tensor:
    """Remove ids or embeddings from `inputs`, and return embeddings, (B, S, hidden).

    Raises:
        ValueError: `inputs` has both or neither; transformers' own forward raises the same.
    """
    embeds = inputs.pop("inputs_embeds", None)
    input_ids = inputs.pop("input_ids", None)
    if (input_ids is None) == (embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    result: torch.Tensor = self.get_input_embeddings()(input_ids) if embeds is None else embeds
    return result


def _encode(self: Any, modality: str, inputs: Tensors) -> tuple[Places, Any]:
    """Run the tower on one modality's pixels; return the scatter index, and the tower's output."""
    index, pixels, grid_thw, known = tower_inputs(self, modality, inputs)
    return index, self.visual(pixels, grid_thw=grid_thw, return_dict=True, **known)


def _encode_frames(self: Any, modality: str, inputs: Tensors) -> tuple[Places, Any]:
    """Run a tower that uses `cu_seqlens` beside its attention, and takes a grid for each frame."""
    cu_seqlens = inputs[f"{modality}_cu_seqlens"]
    frames = len(cu_seqlens) - 1
    index, pixels, grid_thw, known = tower_inputs(self, modality, inputs)
    if not isinstance(known["cu_seqlens"], torch.Tensor):
        # The tower interpolates its position embeddings by the tensor; attention needs host ints.
        known |= {"cu_seqlens": cu_seqlens, "segments": known["cu_seqlens"]}
    if frames != len(grid_thw):
        # Without `output_size`, repeat_interleave syncs to learn the length of its result.
        rows = torch.repeat_interleave(grid_thw, grid_thw[:, 0], dim=0, output_size=frames)
        grid_thw = torch.cat((torch.ones_like(rows[:, :1]), rows[:, 1:]), dim=1)
    return index, self.visual(pixels, grid_thw=grid_thw, return_dict=True, **known)


def _encode_raster(self: Any, modality: str, inputs: Tensors) -> tuple[Places, Any]:
    """Run PaddleOCR-VL's tower, and merge the patches of all images at once by their index."""
    blocks = inputs.pop(f"{modality}_block_index")
    index, pixels, grid_thw, known = tower_inputs(self, modality, inputs)
    output = self.visual(pixels[None], grid_thw=grid_thw, return_dict=True, **known)
    output.pooler_output = self.projector(output.last_hidden_state, blocks)
    return index, output


def merge_patches(self: Any, image_features: torch.Tensor, image_grid_thw: torch.Tensor) -> Any:
    """Merge patches of all images into features; replaces the forward of PaddleOCR-VL's projector.

    The projector's own forward splits by image, whose sizes it reads back from the grids.

    Args:
        image_features: (P, hidden), in raster order.
        image_grid_thw: int64 (P,), the order in which blocks of patches are merged. Given grids,
            (images, 3), as from the model's own forward, the projector's own forward is called.
    """
    if image_grid_thw.ndim == 2:
        return type(self).forward(self, image_features, image_grid_thw)
    patches = self.pre_norm(image_features).index_select(0, image_grid_thw)
    across, down = self.merge_kernel_size
    merged = self.linear_1(patches.reshape(-1, across * down * patches.shape[-1]))
    return self.linear_2(self.act(merged))


def vision_tower(self: Any) -> Any:
    """Return the vision tower of a base model."""
    return getattr(self, next(name for name in VISION_TOWERS if hasattr(self, name)))


def host_grids(modality: str, inputs: Tensors, grid_thw: torch.Tensor) -> torch.Tensor:
    """Return the grids of a modality on the host if the batch has them there too.

    Some towers ask their grids for values, which is no sync then.
    """
    sizes = inputs.pop(f"{modality}_grid_sizes", None)
    return grid_thw if sizes is None else torch.tensor(sizes)


def tower_inputs(
    self: Any, modality: str, inputs: Tensors
) -> tuple[Places, torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Remove a modality from `inputs`; return places, pixels, grids, and tower keywords."""
    tower = vision_tower(self)
    pixels = inputs.pop(PIXELS[modality]).type(tower.dtype)
    known = {name: inputs.pop(f"{modality}_{name}", None) for name in VISION_READ_SINCE}
    known = {name: value for name, value in known.items() if value is not None}
    for name, longest, sizes in _BORDERS:
        lengths = inputs.pop(f"{modality}_{sizes}", None)
        if name not in known:
            continue
        # Towers pass `cu_seqlens` to their attention unread, so that this can take its place.
        borders = tower_borders(tower, pixels, known[name], known[longest], lengths)
        if borders is not None:
            known[name] = borders
    return _take_places(modality, inputs), pixels, inputs.pop(f"{modality}_grid_thw"), known


def _take_places(modality: str, inputs: Tensors) -> Places:
    """Remove from `inputs` where a modality's features go, and return it."""
    if modality == "vision":
        return Gather(inputs.pop("vision_feature_index"), inputs.pop("vision_feature_mask"))
    places: torch.Tensor = inputs.pop(f"{modality}_scatter_index")
    return places


def scatter_features(embeds: torch.Tensor, index: Places, features: torch.Tensor) -> torch.Tensor:
    """Return embeddings with the tokens at flat indices replaced by feature rows.

    Args:
        embeds: (B, S, hidden).
        index: (N,) int64, into the B * S tokens, or a `Gather`.
        features: (N, hidden).
    """
    features = features.to(embeds.device, embeds.dtype)
    if isinstance(index, Gather):
        return torch.where(index.mask[..., None], index.rows_of(features), embeds)
    # Not masked_scatter: its backward selects by the mask, whose count the host must learn. The
    # backward of index_copy is index_select at the same index, whose length is known.
    return embeds.flatten(0, 1).index_copy(0, index, features).view_as(embeds)


def run_text_model(
    self: Any, embeds: torch.Tensor, inputs: Tensors, encoded: Mapping[str, Any]
) -> Any:
    """Run the text model on embeddings (B, S, hidden), under a mask decided by host facts.

    Args:
        encoded: output of the tower for each modality of the batch.
    """
    deltas = inputs.pop("rope_deltas", None)
    if deltas is not None:
        self.rope_deltas = deltas  # where transformers' generate looks for it
    mask = take_mask(inputs)
    config = self.language_model.config
    if inputs.get("seq_idx") is not None:
        packed = packed_mask(self.language_model, embeds, inputs)
        mask = packed if mask is None else mask
    elif not isinstance(mask, dict):
        mask = causal_mask(config, embeds, mask, cache_of(inputs))
        if (
            mask is None
            and cache_of(inputs) is None
            and self.language_model.mrope_attention == "varlen"
        ):
            inputs[ONLY_CAUSAL] = True
    for name in ("has_padding", "mm_token_type_ids", "second_per_grid_ts", "mm_encoder_outputs"):
        inputs.pop(name, None)
    outputs = self.language_model(
        input_ids=None, inputs_embeds=embeds, attention_mask=mask, **inputs
    )
    return own_output(self, outputs, encoded)


def take_mask(inputs: Tensors) -> Any:
    """Remove the attention mask from `inputs`; return it where it matters, else None.

    A padding mask (B, S) matters if the worker found padding. Whatever else stands in its place, a
    mask of four dimensions or a dict, is the user's own, and is what the model attends by.
    """
    mask = inputs.pop("attention_mask", None)
    # Whether a mask on the device holds a 0 is known on the device alone; asking is a sync. The
    # worker built the mask, so it sends the answer along.
    is_padding = isinstance(mask, torch.Tensor) and mask.ndim == 2
    return None if is_padding and not inputs["has_padding"] else mask


# Those of the Omni thinkers are in `mrope.hf.omni_forwards`.
VISION_FORWARDS: dict[str, Callable[..., Any]] = {
    "qwen2_vl": flat_forward,
    "qwen2_5_vl": flat_forward,
    "qwen3_vl": deepstack_forward,
    "qwen3_vl_moe": deepstack_forward,
    "qwen3_5": flat_forward,
    "qwen3_5_moe": flat_forward,
    "qwen4_exp": ngram_forward,
    "glm4v": frames_forward,
    "glm4v_moe": frames_forward,
    "glm46v": frames_forward,
    "glm_ocr": flat_forward,
    "cohere_compass": deepstack_forward,
    "cosmos3_omni": deepstack_forward,
    "paddleocr_vl": raster_forward,
}
