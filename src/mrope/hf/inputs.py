"""Take from a batch what an attached forward runs on, and tell whether it has all of it."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch

from mrope.columns import COLUMNS, LINEAR_KEYS, NewColumns, columns, tower_key
from mrope.errors import MRopeError
from mrope.hf.attention import INDEXED, RECURRENT, has_layers, is_flash
from mrope.hf.generation import is_generating
from mrope.hf.varlen import can_attend

Tensors = MutableMapping[str, Any]

# Images and clips of a batch of fixed shapes are one modality, "vision": they share a tower call.
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos", "vision": "pixel_values"}
SOUND = "input_features"

# What the stage adds for each tower: keys of the batch, and the tower's own names.
_ADDED: dict[str, dict[str, str]] = {
    modality: {
        key: key.removeprefix(tower_key(modality, ""))
        for key in columns("derived", modality=modality)
    }
    for modality in (*PIXELS, "audio")
}
_SIZES = {modality: tuple(columns("item", modality=modality, means="size")) for modality in _ADDED}
_NEEDED = {
    modality: tuple(tower_key(modality, name) for name in names)
    for modality, names in {
        "image": ("scatter_index", "split_sizes"),
        "video": ("scatter_index", "split_sizes"),
        "vision": ("feature_index", "feature_mask", "cu_seqlens"),
        "audio": ("padded_feature", "scatter_index", "split_sizes"),
    }.items()
}
# A part of a sequence has none.
_NEEDED["vision"] += ("has_padding",)
# Of the table's columns text models read: how linear layers cut a row, and ERNIE's experts.
_READ = ("segment_sizes", *LINEAR_KEYS, "moe_mm_token_type_ids")
_UNREAD = frozenset({*COLUMNS, "audio_feature_lengths", "mm_encoder_outputs"}.difference(_READ))


def modalities_of(inputs: Tensors) -> list[str]:
    """Return what the batch has pixels of."""
    if inputs.get("vision_feature_mask") is not None:
        return ["vision"]
    return [name for name in ("image", "video") if inputs.get(PIXELS[name]) is not None]


def is_precomputed(self: Any, inputs: Tensors, audio: bool) -> bool:
    """Return whether the batch has what an attached forward needs.

    Args:
        self: the base model.
        inputs: the batch.
        audio: whether its audio tower takes tensors of the stage.

    Raises:
        MRopeError: it does not, or its pixels or sound were removed, and the model is strict; or it
            has vision tensors alone.
    """
    modalities = modalities_of(inputs)
    # Whoever decodes computes position ids and prefills a cache: no collator made the batch.
    decoding = cache_of(inputs) is not None and inputs.get("position_ids") is not None
    lost = _lost(inputs)
    refuses = self.mrope_strict and not decoding and not is_generating()
    if lost and refuses:
        raise MRopeError(
            f"an attached model got {lost[0]} without {lost[1]}, and would train without what its "
            "placeholder tokens stand for: remove nothing of a batch behind the MRopeCollator"
        )
    missing = _missing(inputs, modalities)
    # What its own forward encodes: audio without tensors, and all of a tower that takes none.
    sound = inputs.get(SOUND) is not None
    missing_audio = _missing(inputs, ["audio"]) if sound and audio else []
    # The collator adds `has_padding` to every batch, also to one of text alone.
    if inputs.get("has_padding") is not None and not missing and not missing_audio:
        if inputs.get("position_ids") is None:
            raise MRopeError(
                "the batch has vision tensors of a MRopeCollator, but no position_ids; PEFT's "
                "prompt learning (prompt tuning, p-tuning) removes them, and adds tokens that they "
                "do not number: it is not supported for attached models"
            )
        if sound and not audio and self.mrope_strict:
            raise MRopeError(
                f"an attached {self.config.model_type} takes no audio, whose tower takes no "
                "precomputed tensors: attach(model, strict=False) leaves such batches to the "
                "model's own forward"
            )
        return audio or not sound
    if refuses:
        _refuse_missing(inputs, modalities, missing, missing_audio)
    return False


def _lost(inputs: Tensors) -> tuple[str, str] | None:
    """Return where features go that no pixels or sound are there for, and what is not there."""
    if inputs.get("inputs_embeds") is not None:  # they may hold the features
        return None
    for modality, source in {**PIXELS, "audio": SOUND}.items():
        key = next(one for one in _NEEDED[modality] if one.endswith("_index"))
        index = inputs.get(key)
        if index is not None and index.numel() and inputs.get(source) is None:
            return key, source
    return None


def _missing(inputs: Tensors, modalities: list[str]) -> list[str]:
    return [key for one in modalities for key in _NEEDED[one] if inputs.get(key) is None]


def _refuse_missing(
    inputs: Tensors, modalities: list[str], missing: list[str], missing_audio: list[str]
) -> None:
    """Raise for media without what the stage adds for them."""
    if missing_audio:
        raise MRopeError(
            f"an attached model got audio without {', '.join(missing_audio)}: let a MRopeCollator "
            "with audio=AudioSpec(...) make the batch, or attach(model, strict=False) to let the "
            "model compute for itself"
        )
    if modalities:
        wanted = "position_ids" if inputs.get("position_ids") is None else ", ".join(missing)
        raise MRopeError(
            f"an attached model got {' and '.join(modalities)} pixels without {wanted}: let a "
            "MRopeCollator with vision=VisionSpec(...) make the batch (rope.vision: true), or "
            "attach(model, strict=False) to let the model compute for itself"
        )


def cache_of(inputs: Tensors) -> Any:
    """Return the key-value cache, or None."""
    # transformers 5.24 renamed the argument, and takes the old name until 5.40.
    cache = inputs.get("cache")
    return inputs.get("past_key_values") if cache is None else cache


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


def take_added(inputs: Tensors, modality: str) -> NewColumns:
    """Remove what the stage added for a tower, and return it by the tower's own names."""
    taken = {name: inputs.pop(key, None) for key, name in _ADDED[modality].items()}
    return {name: value for name, value in taken.items() if value is not None}


def take_sizes(inputs: Tensors, modality: str) -> Any:
    """Remove and return the sizes of a modality on the device: grids, or crops' sizes."""
    found = [value for key in _SIZES[modality] if (value := inputs.pop(key, None)) is not None]
    return found[0] if found else None


def asked_of_towers(inputs: Tensors) -> NewColumns:
    """Return which outputs of each layer the caller asks for, of towers and text model alike."""
    names = ("output_hidden_states", "output_attentions")
    return {name: inputs[name] for name in names if inputs.get(name) is not None}


def take_mask(inputs: Tensors, config: object, embeds: torch.Tensor) -> Any:
    """Remove the attention mask from `inputs`; return it where it matters, else None.

    A padding mask (B, S) matters if the worker found padding; behind the tokens of its row, only to
    kernels that are no faster without it, since no token attends to what comes later. Flash
    attention would unpad by it, a sync. Whatever else stands in its place, a mask of four
    dimensions or a dict, is the user's own, and is what the model attends by.

    Args:
        inputs: the batch.
        config: the text model's.
        embeds: (B, S, hidden).
    """
    mask = inputs.pop("attention_mask", None)
    if not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        return mask
    # Whether a mask on the device holds a 0 is known on the device alone; asking is a sync. The
    # worker built the mask, so it sends the answer along.
    if not inputs["has_padding"]:
        return None
    hidden = (
        inputs.get("padded_behind", False)
        and cache_of(inputs) is None  # which later tokens would find the padding in
        and (is_flash(config) or can_attend(embeds))
        and not has_layers(config, *INDEXED)  # whose blocks of keys may hold both
        and not (has_layers(config, *RECURRENT) and fills_cache(inputs, config))
    )
    return None if hidden else mask


def fills_cache(inputs: Tensors, config: object) -> bool:
    """Whether the text model is to return a cache; nobody decodes from a step with gradients.

    The state that a recurrent layer leaves there is that behind the padding.
    """
    asked: bool | None = inputs.get("use_cache")
    if asked is None:
        return getattr(config, "use_cache", False) and not torch.is_grad_enabled()
    return asked


def drop_unread(inputs: Tensors) -> None:
    """Remove the columns that no text model reads: it would pass them on to its layers."""
    for name in [one for one in inputs if one in _UNREAD]:
        del inputs[name]
