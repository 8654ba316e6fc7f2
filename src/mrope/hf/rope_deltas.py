"""Let transformers models keep the `rope_deltas` of a batch, for decoding from the cache.

A model that computes position ids stores the `rope_deltas` of the rows on its base model, and adds
them to the positions of the tokens that it decodes. Given `position_ids`, it computes nothing and
stores nothing: the next token then gets a 1-D position, or one with an earlier batch's deltas.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel


def keep_rope_deltas() -> None:
    """Let every transformers model of this process store the `rope_deltas` that it is called with.

    `import mrope.hf` calls this. It replaces `PreTrainedModel.__call__`, through which whole models
    and towers are called, not their layers. A model without the attribute `rope_deltas`, and a call
    without that keyword, go on as before.
    """
    own = vars(PreTrainedModel).get("__call__")
    if hasattr(own, "mrope_own"):
        return

    def call(self: Any, *args: Any, **inputs: Any) -> Any:
        deltas = inputs.get("rope_deltas")
        if deltas is not None and _keeps_deltas(type(self)):
            self.rope_deltas = deltas
        # Module's is looked up at each call: torch.fx replaces it for as long as it traces.
        return (own or torch.nn.Module.__call__)(self, *args, **inputs)

    call.mrope_own = own  # type: ignore[attr-defined]
    PreTrainedModel.__call__ = call


def drop_rope_deltas() -> None:
    """Undo `keep_rope_deltas`, unless another library replaced `PreTrainedModel.__call__` since."""
    call = vars(PreTrainedModel).get("__call__")
    if not hasattr(call, "mrope_own"):
        return
    if call.mrope_own is None:
        del PreTrainedModel.__call__
    else:
        PreTrainedModel.__call__ = call.mrope_own


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
