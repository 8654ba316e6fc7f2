"""Omni thinkers that read: the forwards of `mrope.hf.forwards`, with audio in front.

The audio tower of transformers 5.23 picks frames by a boolean mask, counts tokens on the device,
and reads its borders back in every layer. Here it is given chunks that were cut in the worker, and
borders that are host ints.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import can_return_tuple

from mrope.collate.layouts import to_model_layout
from mrope.errors import MRopeError
from mrope.hf.attention import as_runs, attend_runs, is_flash
from mrope.hf.forwards import Tensors, put, read_deepstack, read_flat, token_embeddings

_TOWER = ("padded_feature", "chunk_lengths", "valid_indices", "pool_indices", "max_seqlen")
# What the thinkers' own forward takes for its positions and its audio mask.
_UNREAD = (
    "input_features",
    "feature_attention_mask",
    "audio_feature_lengths",
    "audio_seqlens",
    "use_audio_in_video",
    "video_second_per_grid",
)


@can_return_tuple  # type: ignore[untyped-decorator]
def read_omni_2_5(self: Any, **inputs: Any) -> Any:
    """Forward of the Qwen2.5-Omni thinker."""
    return _read(read_flat, self, inputs)


@can_return_tuple  # type: ignore[untyped-decorator]
def read_omni_3(self: Any, **inputs: Any) -> Any:
    """Forward of the Qwen3-Omni thinker."""
    return _read(read_deepstack, self, inputs)


def _read(read: Callable[..., Any], self: Any, inputs: Tensors) -> Any:
    inputs = dict(to_model_layout(inputs))
    if inputs.get("input_features") is not None:
        missing = [
            f"audio_{name}"
            for name in ("padded_feature", "scatter_index", "split_sizes")
            if inputs.get(f"audio_{name}") is None
        ]
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
        inputs["inputs_embeds"] = put(embeds, index, _encode_audio(self, inputs))
    if inputs.get("has_padding") is not None:
        for name in [one for one in inputs if one.startswith("audio_") or one in _UNREAD]:
            del inputs[name]
    return read(self, **inputs)


def _encode_audio(self: Any, inputs: Tensors) -> torch.Tensor:
    known = {name: inputs.get(f"audio_{name}") for name in _TOWER}
    known = {name: value for name, value in known.items() if value is not None}
    known["cu_seqlens"] = inputs["audio_cu_seqlens"]
    if not is_flash(self.audio_tower.config):
        # The tower hands these on to its attention, where `attend_audio` knows them.
        known["cu_seqlens"] = as_runs(inputs["audio_split_sizes"])
    features: torch.Tensor = self.audio_tower(return_dict=True, **known).last_hidden_state
    return features


def attend_audio(
    self: Any,
    hidden_states: torch.Tensor,
    cu_seqlens: tuple[tuple[int, int], ...] | torch.Tensor,
    max_seqlen: int | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Attend within each window of an audio; stands in for the audio tower's attention.

    Args:
        cu_seqlens: as `mrope.hf.attention.attend_segments` takes them.
    """
    if isinstance(cu_seqlens, torch.Tensor):
        own = type(self).forward
        result: torch.Tensor = own(self, hidden_states, cu_seqlens, max_seqlen, **kwargs)
        return result
    tokens = len(hidden_states)
    projections = (self.q_proj, self.k_proj, self.v_proj)
    query, key, value = (
        project(hidden_states).reshape(tokens, self.num_heads, -1) for project in projections
    )
    attended: torch.Tensor = self.out_proj(
        attend_runs(self, query, key, value, cu_seqlens, **kwargs)
    )
    return attended


def attend_frames(
    self: Any,
    hidden_states: torch.Tensor,
    cu_seqlens: tuple[tuple[int, int], ...] | torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    max_seqlen: int | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Do what `attend_segments` does in a tower with three projections (Qwen2.5-Omni)."""
    if isinstance(cu_seqlens, torch.Tensor):
        own = type(self).forward
        result: torch.Tensor = own(
            self, hidden_states, cu_seqlens, position_embeddings, max_seqlen, **kwargs
        )
        return result
    patches = len(hidden_states)
    query, key, value = (
        project(hidden_states).reshape(patches, self.num_heads, -1)
        for project in (self.q, self.k, self.v)
    )
    modelling: Any = sys.modules[type(self).__module__]
    query, key = modelling.apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    attended: torch.Tensor = self.proj(attend_runs(self, query, key, value, cu_seqlens, **kwargs))
    return attended


THINKERS: dict[str, Callable[..., Any]] = {
    "qwen2_5_omni_thinker": read_omni_2_5,
    "qwen3_omni_moe_thinker": read_omni_3,
}
