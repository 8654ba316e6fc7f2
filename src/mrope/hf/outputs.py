"""What a base model returns: the text model's outputs, and fields that only the base model has."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling


@dataclass
class JoinedFeatures(BaseModelOutputWithPooling):  # type: ignore[misc]
    """What an attached model returns as `image_outputs` of one tower call for images and clips.

    With fixed shapes (`MRopeCollator(shapes=...)`) images and clips share a call, padded to a rung,
    and the host does not know where one ends: features are not split, where the unmodified model
    has a tuple or a list with those of each image. Rows behind the last clip's are padding.

    Attributes:
        pooler_output: (rung, hidden of the text), features of images, then of clips, in the order
            of the batch: `vision_feature_index` has the row of each token.
        last_hidden_state: of the tower, for the patches of the rung.
        hidden_states: the same behind each layer, if asked for.
        attentions: as of the unmodified model, if asked for.
        deepstack_features: of each deeper layer (rung, hidden of the text), for towers with some.
    """

    deepstack_features: list[torch.Tensor] | None = None


class Encoded(NamedTuple):
    """What a tower returned for one modality.

    Attributes:
        output: with the features in `pooler_output`, and those of deeper layers, if any, in
            `deepstack_features`.
        counts: features of each image or clip; None where the host does not know them, as with
            fixed shapes, whose images and clips come out of one tower call.
        parts: in what the plain model returns the features of each.
    """

    output: Any
    counts: list[int] | None = None
    parts: type[list[Any] | tuple[Any, ...]] = tuple

    def by_item(self) -> Any:
        """Return the output with the features of each image or clip apart, as a plain model's.

        `JoinedFeatures` where the host does not know how many each has.
        """
        features, deeper = self.output.pooler_output, _deeper(self.output)
        if self.counts is None:
            joined = isinstance(features, torch.Tensor)  # or GLM-Image's, which come apart
            return _as_joined(self.output) if joined else self.output
        self.output.pooler_output = self.parts(torch.split(features, self.counts))
        if deeper is not None:
            split = [torch.split(level, self.counts) for level in deeper]
            self.output.deepstack_features = split
        return self.output


def _as_joined(output: object) -> JoinedFeatures:
    names = JoinedFeatures.__dataclass_fields__
    return JoinedFeatures(**{name: getattr(output, name, None) for name in names})


def _deeper(output: object) -> Any:
    return getattr(output, "deepstack_features", None)


def own_output(self: Any, outputs: Any, encoded: Mapping[str, Encoded]) -> Any:
    """Return the text model's outputs as the base model returns them."""
    multimodal = _multimodal_output(type(self))
    if multimodal is None:
        return outputs
    own = {"rope_deltas": getattr(self, "rope_deltas", None)}
    for modality, tower in encoded.items():
        features = tower.output.pooler_output
        names = _fields("image" if modality == "vision" else modality)
        own |= zip(names, (tower.by_item(), features, features), strict=True)
    for name in _unknown_fields(type(self)):
        own.pop(name, None)
    return multimodal(**outputs, **own)


def _fields(modality: str) -> tuple[str, ...]:
    """Return where an output has a tower's: today, and up to 5.23."""
    kinds = ("outputs", "pooler_output", "hidden_states")
    return tuple(f"{modality}_{kind}" for kind in kinds)


_OUTPUTS: dict[type, Any] = {}
_ADDED_FIELDS = (
    "rope_deltas",
    *_fields("image"),
    *_fields("video"),
)


# A constant under torch.compile, which cannot trace `inspect`; it would warn of an lru_cache.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _multimodal_output(model_class: type) -> Any:
    """Return the class of a base model's output if it has fields that the text model's has not.

    Since transformers 5.24 it holds the towers' outputs, up to 5.22 `rope_deltas`; None where the
    model returns the text model's output as it is.
    """
    if model_class not in _OUTPUTS:
        _OUTPUTS[model_class] = _find_output(model_class)
    return _OUTPUTS[model_class]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _unknown_fields(model_class: type) -> tuple[str, ...]:
    """Return which of the fields that a base model may add its output class does not have."""
    fields = _multimodal_output(model_class).__dataclass_fields__
    return tuple(name for name in _ADDED_FIELDS if name not in fields)


def _find_output(model_class: type) -> Any:
    for ancestor in model_class.__mro__:
        forward: Any = inspect.unwrap(vars(ancestor).get("forward", ancestor))
        # By the names in its code: in 5.24 the annotation of some families is another class.
        for name in forward.__code__.co_names if inspect.isfunction(forward) else ():
            output = forward.__globals__.get(name)
            if {*_ADDED_FIELDS} & {*getattr(output, "__dataclass_fields__", ())}:
                return output
    return None
