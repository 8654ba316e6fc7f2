"""Let transformers models take batches of the stage to `forward` and `generate`.

A model that computes position ids stores the `rope_deltas` of the rows on its base model, and adds
them to the positions of the tokens that it decodes. Given `position_ids`, it computes nothing and
stores nothing: the next token then gets a 1-D position, or one with an earlier batch's deltas.
"""

from __future__ import annotations

import inspect
import warnings
from functools import wraps
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel

from mrope.columns import NewColumns
from mrope.errors import MRopeError
from mrope.hf.generation import for_generate, of_the_stage, while_generating


def keep_rope_deltas() -> None:
    """Let every transformers model of this process store the `rope_deltas` that it is called with.

    `import mrope.hf` calls this. It replaces `PreTrainedModel.__call__`, through which whole models
    and towers are called, not their layers. A model without the attribute `rope_deltas`, and a call
    without that keyword, go on as before. `GenerationMixin.generate` is replaced too: given a batch
    of the stage, it takes of it what `for_generate` returns.

    A model that is not attached raises a `MRopeError` for a batch of fixed shapes.

    Warns:
        UserWarning: a model is called with `rope_deltas` and without position ids: PEFT's prompt
            learning removes them.
    """
    own = vars(PreTrainedModel).get("__call__")
    if hasattr(own, "mrope_own"):
        return

    def call(self: Any, *args: Any, **inputs: Any) -> Any:
        deltas = inputs.get("rope_deltas")
        if deltas is not None and _keeps_deltas(type(self)):
            if _lacks_positions(self, args, inputs):
                _warn_of_dropped_positions()
            self.rope_deltas = deltas
        if inputs.get("vision_feature_mask") is not None and _keeps_deltas(type(self)):
            _refuse_fixed_shapes(self)
        # Module's is looked up at each call: torch.fx replaces it for as long as it traces.
        return (own or torch.nn.Module.__call__)(self, *args, **inputs)

    call.mrope_own = own  # type: ignore[attr-defined]
    PreTrainedModel.__call__ = call
    _generate_from_batches()


def drop_rope_deltas() -> None:
    """Undo `keep_rope_deltas`, where no other library has replaced the same method since."""
    call = vars(PreTrainedModel).get("__call__")
    if hasattr(call, "mrope_own"):
        if call.mrope_own is None:
            del PreTrainedModel.__call__
        else:
            PreTrainedModel.__call__ = call.mrope_own
    generate = GenerationMixin.generate
    if hasattr(generate, "mrope_own"):
        GenerationMixin.generate = generate.mrope_own


def _generate_from_batches() -> None:
    """Let `generate` take batches of the stage."""
    own = GenerationMixin.generate
    if hasattr(own, "mrope_own"):
        return

    @wraps(own)
    def generate(self: object, *args: object, **inputs: object) -> Any:
        with while_generating():
            return own(self, *args, **(for_generate(inputs) if of_the_stage(inputs) else inputs))

    generate.mrope_own = own  # type: ignore[attr-defined]
    GenerationMixin.generate = generate


def _lacks_positions(self: object, args: tuple[Any, ...], inputs: NewColumns) -> bool:
    """Whether position ids were dropped; an attached model raises, and says more."""
    given = args or inputs.get("position_ids") is not None  # by position they may be among others
    return not given and getattr(self, "mrope_strict", None) is None


def _refuse_fixed_shapes(self: object) -> None:
    """Raise for a model that does not know padding patches from images."""
    if getattr(self, "mrope_strict", None) is None:
        raise MRopeError(
            f"the batch has fixed shapes, and {type(self).__name__} is not attached, which takes "
            "no padding of patches: attach(model), or give the MRopeCollator no shapes"
        )


def _warn_of_dropped_positions() -> None:
    warnings.warn(
        "a model was called with what the stage computed, and without its position_ids, as by "
        "PEFT's prompt learning: it trains on 1-D positions",
        UserWarning,
        stacklevel=3,
    )


# A constant under torch.compile. Asked of the instance, the attribute would be guarded, and its
# change from None to a tensor would compile the model a second time.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _keeps_deltas(model_class: type) -> bool:
    """Whether models of a class set the attribute `rope_deltas` when they are made."""
    for ancestor in model_class.__mro__:
        init: Any = inspect.unwrap(vars(ancestor).get("__init__", ancestor))
        if inspect.isfunction(init) and "rope_deltas" in init.__code__.co_names:
            return True
    return False
