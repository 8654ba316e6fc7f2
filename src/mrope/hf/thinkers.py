"""Base models that hold their head themselves: the Omni thinkers up to transformers 5.21.

Such a thinker is base model and head in one, and its text model is `model`. What comes before the
text model is replaced as everywhere; the text model, head and loss are run by the thinker's own
forward, which is given embeddings and none of the media. It passes on to the text model what it
does not know, so that masks and deeper features reach it in one keyword.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from mrope.hf.attention import modelling_of
from mrope.hf.inputs import Tensors

TEXT_MODELS = ("language_model", "model")
"""Where base models hold their text model."""

_FOR_TEXT = "mrope_text_inputs"
_OWNED = ("visual_pos_masks", "deepstack_visual_embeds")


def text_model(base: PreTrainedModel) -> PreTrainedModel:
    """Return the text model of a base model."""
    return base.model if holds_head(base) else base.language_model


def holds_head(base: torch.nn.Module) -> bool:
    """Whether a base model holds its head itself."""
    # In `_modules`: a wrapper has the attributes of what it wraps.
    return "language_model" not in base._modules  # noqa: SLF001 - no public name


def is_text_of_thinker(module: torch.nn.Module) -> bool:
    """Whether a module is the text model of such a base model."""
    kind = getattr(getattr(module, "config", None), "model_type", None)
    # In `_modules`: layers have the config too.
    if kind not in _THINKERS or "embed_tokens" not in module._modules:  # noqa: SLF001
        return False
    return not hasattr(modelling_of(module), _THINKERS[kind])


# By the text model's type, the class that holds it where the thinker's head stands apart.
_THINKERS = {
    "qwen2_5_omni_text": "Qwen2_5OmniThinkerModel",
    "qwen3_omni_moe_text": "Qwen3OmniMoeThinkerModel",
}


class _ThroughHead:
    """A text model as `mrope.hf.text` runs it, called through the forward of its thinker."""

    def __init__(self, base: PreTrainedModel, inputs: Tensors) -> None:
        self.base, self.config = base, base.model.config
        self.mrope_attention = base.model.mrope_attention
        # What a text model is not given. The loss of experts is over the tokens of the 2-D mask.
        self.own = {name: inputs.get(name) for name in ("attention_mask", "labels")}

    def __call__(self, attention_mask: torch.Tensor | None, **inputs: object) -> ModelOutput:
        """Run the thinker's own forward on embeddings."""
        for_text = {name: inputs.pop(name) for name in _OWNED if name in inputs}
        inputs[_FOR_TEXT] = {**for_text, "attention_mask": attention_mask}
        return type(self.base).forward(self.base, **self.own, **inputs)


def text_to_run(base: PreTrainedModel, inputs: Tensors) -> PreTrainedModel | _ThroughHead:
    """Return what runs the text model on embeddings: itself, or the thinker that holds its head."""
    return _ThroughHead(base, inputs) if holds_head(base) else text_model(base)


def take_text_inputs(self: PreTrainedModel, **inputs: Any) -> ModelOutput:
    """Run the text model on what an attached thinker passes it; replaces its forward."""
    return type(self).forward(self, **{**inputs, **inputs.pop(_FOR_TEXT, {})})
