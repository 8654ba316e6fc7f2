"""What a base model returns: the text model's outputs, and fields that only the base model has."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch


def own_output(self: Any, outputs: Any, encoded: Mapping[str, Any]) -> Any:
    """Return the text model's outputs as the base model returns them."""
    multimodal = _multimodal_output(type(self))
    if multimodal is None:
        return outputs
    # Images and clips of fixed shapes come out of one tower call.
    named = {"image" if name == "vision" else name: tower for name, tower in encoded.items()}
    own = {"rope_deltas": getattr(self, "rope_deltas", None)}
    for name, tower in named.items():
        own[f"{name}_outputs"] = tower
        # Their names up to 5.23, of LFM3-VL and of VideoLLaMA 3.
        own[f"{name}_pooler_output"] = own[f"{name}_hidden_states"] = tower.pooler_output
    for name in _unknown_fields(type(self)):
        own.pop(name, None)
    return multimodal(**outputs, **own)


_OUTPUTS: dict[type, Any] = {}
_ADDED_FIELDS = (
    "rope_deltas",
    *(f"{name}_outputs" for name in ("image", "video")),
    *(f"{name}_pooler_output" for name in ("image", "video")),
    *(f"{name}_hidden_states" for name in ("image", "video")),
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
