"""Forwards of attached Omni thinkers: those of `mrope.hf.forwards`, with audio encoded first.

The audio tower of transformers 5.23 picks frames by a boolean mask, counts tokens on the device,
and reads its borders back in every layer. Here it takes chunks that the worker cut, and segment
lengths that are host ints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import can_return_tuple

from mrope.collate.layouts import to_model_layout
from mrope.errors import MRopeError
from mrope.hf.attention import tower_borders
from mrope.hf.forwards import (
    Tensors,
    deepstack_forward,
    flat_forward,
    scatter_features,
    token_embeddings,
)

_TOWER = ("padded_feature", "chunk_lengths", "valid_indices", "pool_indices", "max_seqlen")
_NEEDED = ("padded_feature", "scatter_index", "split_sizes")
# Inputs of the thinkers' own forward: for its position ids, and for its mask of audio frames.
_UNUSED = (
    "input_features",
    "feature_attention_mask",
    "audio_feature_lengths",
    "audio_seqlens",
    "use_audio_in_video",
    "video_second_per_grid",
)


@can_return_tuple  # type: ignore[untyped-decorator]
def omni_2_5_forward(self: Any, **inputs: Any) -> Any:
    """Forward of the Qwen2.5-Omni thinker."""
    return _forward(flat_forward, self, inputs)


@can_return_tuple  # type: ignore[untyped-decorator]
def omni_3_forward(self: Any, **inputs: Any) -> Any:
    """Forward of the Qwen3-Omni thinker."""
    return _forward(deepstack_forward, self, inputs)


def _forward(vision_forward: Callable[..., Any], self: Any, inputs: Tensors) -> Any:
    """Replace the placeholders of audio by its features, then run a forward for the rest.

    Raises:
        MRopeError: the batch has audio without precomputed tensors, and the model is strict.
    """
    inputs = dict(to_model_layout(inputs))
    if inputs.get("input_features") is not None:
        missing = [f"audio_{name}" for name in _NEEDED if inputs.get(f"audio_{name}") is None]
        if missing and self.mrope_strict:
            raise MRopeError(
                f"an attached model got audio without {', '.join(missing)}: let a MRopeCollator "
                "with audio=AudioSpec(...) make the batch, or attach(model, strict=False) to let "
                "the model compute for itself"
            )
        if missing:
            return type(self).forward(self, **inputs)
        embeds = token_embeddings(self, inputs)
        index = inputs["audio_scatter_index"]
        inputs["inputs_embeds"] = scatter_features(embeds, index, _encode_audio(self, inputs))
    if inputs.get("has_padding") is not None:
        # The text model takes any keyword, and passes it to layers that do not know these.
        for name in [one for one in inputs if one.startswith("audio_") or one in _UNUSED]:
            del inputs[name]
    return vision_forward(self, **inputs)


def _encode_audio(self: Any, inputs: Tensors) -> torch.Tensor:
    """Return the features of all audio of a batch, (features, hidden)."""
    known: dict[str, Any] = {name: inputs.get(f"audio_{name}") for name in _TOWER}
    known = {name: value for name, value in known.items() if value is not None}
    cu_seqlens, lengths = inputs["audio_cu_seqlens"], inputs["audio_split_sizes"]
    patches, longest = known["padded_feature"], known["max_seqlen"]
    borders = tower_borders(self.audio_tower, patches, cu_seqlens, longest, lengths)
    known["cu_seqlens"] = cu_seqlens if borders is None else borders
    features: torch.Tensor = self.audio_tower(return_dict=True, **known).last_hidden_state
    return features


OMNI_FORWARDS: dict[str, Callable[..., Any]] = {
    "qwen2_5_omni_thinker": omni_2_5_forward,
    "qwen3_omni_moe_thinker": omni_3_forward,
}
