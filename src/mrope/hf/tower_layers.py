"""Attention layers of towers: how each class is built, and the forward that replaces its own."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from mrope.hf.attention import Borders, attend_within, modelling_of


@dataclass(frozen=True)
class TowerLayer:
    """Describe the attention layer of a tower: what differs between transformers' classes.

    Attributes:
        inputs: names of the projections to query, key and value: one fused projection, or three.
        output: name of the projection behind the attention.
        norms: names of the norms of query and key, before they are rotated.
        rotary: whether query and key are rotated by `position_embeddings`.
        scale: attribute with the factor of the scores.
        dropout: attribute with the rate of attention dropout; a layer without it has none.
        returns_pair: whether the layer returns (output, attention weights).
        weights: in what it returns the weights of the segments; None: it returns None for them.
        takes_longest: whether the layer's own forward takes the length of the longest segment as a
            host int, which before 5.15 it reads back from the borders under flash attention.
        rotate, attend: functions of the modelling file that defines the layer's forward, so that
            rounding is that of its own: of query and key by `position_embeddings`, and eager
            attention. Bound by `bound_to`, since `torch.compile` cannot trace the search for them.
    """

    inputs: tuple[str, ...]
    output: str
    norms: tuple[str, ...] = ()
    rotary: bool = True
    scale: str = "scaling"
    dropout: str = "attention_dropout"
    returns_pair: bool = False
    weights: type[list[Any] | tuple[Any, ...]] | None = None
    takes_longest: bool = True
    rotate: Any = None
    attend: Any = None

    def bound_to(self, layer: torch.nn.Module) -> TowerLayer:
        """Return this description with the functions of a layer's modelling file."""
        module = modelling_of(layer)
        rotate = getattr(module, "apply_rotary_pos_emb_vision", None)
        if rotate is not None and len(inspect.signature(rotate).parameters) == 2:
            rotate = partial(_rotate_by_angles, rotate)
        takes_longest = "max_seqlen" in inspect.signature(type(layer).forward).parameters
        attend = module.eager_attention_forward
        return replace(self, rotate=rotate, attend=attend, takes_longest=takes_longest)

    def describes(self, layer: torch.nn.Module) -> bool:
        """Whether a layer has these modules and no other, which it might run in between."""
        # A wrapper has its copy's attributes, but not its modules.
        children = layer._modules.keys()  # noqa: SLF001 - no public name
        return children == {*self.inputs, *self.norms, self.output} and hasattr(layer, self.scale)


def _rotate_by_angles(
    rotate: Any, query: torch.Tensor, key: torch.Tensor, angles: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Rotate by a function of one tensor (1, N, heads, d): Qwen2.5-Omni's up to 5.17."""
    return tuple(rotate(one[None], angles)[0] for one in (query, key))


FUSED = TowerLayer(("qkv",), "proj")
FUSED_NORMED = TowerLayer(("qkv",), "proj", norms=("q_norm", "k_norm"))
OMNI_2_5_VISION = TowerLayer(("q", "k", "v"), "proj")
PADDLEOCR = TowerLayer(("q_proj", "k_proj", "v_proj"), "out_proj", returns_pair=True, weights=list)
AUDIO = TowerLayer(("q_proj", "k_proj", "v_proj"), "out_proj", rotary=False)
HUNYUAN = TowerLayer(("q_proj", "k_proj", "v_proj"), "o_proj", rotary=False, returns_pair=True)
NORMED = TowerLayer(
    ("q_proj", "k_proj", "v_proj"),
    "out_proj",
    norms=("q_norm", "k_norm"),
    returns_pair=True,
    weights=tuple,
)
SIGLIP = TowerLayer(
    ("q_proj", "k_proj", "v_proj"), "out_proj", rotary=False, scale="scale", dropout="dropout"
)


def tower_forward(
    self: Any,
    hidden_states: torch.Tensor,
    cu_seqlens: Borders | torch.Tensor,
    **kwargs: Any,
) -> Any:
    """Attend within segments; replaces the forward of a tower's attention layer.

    Args:
        self: the layer; its `mrope_parts` say how it is built.
        hidden_states: (N, hidden), or (1, N, hidden) in towers of a batch of one.
        cu_seqlens: `Borders` in place of the tensor; or the tensor with an attribute
            `mrope_borders`, for towers that compute with it themselves, by N where the tower merges
            patches between its layers. Given only a tensor, as under flash attention, the layer's
            own forward is called.
    """
    within: Any = getattr(cu_seqlens, "mrope_borders", cu_seqlens)
    if isinstance(within, dict):
        within = within[hidden_states.shape[-2]]
    # None once the model is detached, while a wrapper still holds this forward.
    parts: TowerLayer | None = getattr(self, "mrope_parts", None)
    own = isinstance(within, torch.Tensor) and (
        parts is None or parts.takes_longest or "max_seqlen" not in kwargs
    )
    if own or parts is None:
        return type(self).forward(self, hidden_states, cu_seqlens, **kwargs)
    # Flash attention's arguments; the other implementations would not know them.
    longest, _ = (kwargs.pop(name, None) for name in ("max_seqlen", "max_window_seqlen"))
    if isinstance(within, torch.Tensor):
        within = Borders(within, longest, None, None, varlen=False)
    # Towers have none for the whole batch; some pass the argument on.
    kwargs.pop("attention_mask", None)
    # GLM-Image's tower, whose layers are built as others', adds its positions before them.
    rotary = kwargs.pop("position_embeddings", None) if parts.rotary else None
    # Qwen2.5-Omni's tower up to 5.17 gives the angles alone, up to 5.9 by this name.
    angles = kwargs.pop("rotary_pos_emb", rotary)
    rotary = (angles,) if isinstance(angles, torch.Tensor) else rotary
    heads = _project(self, parts, hidden_states, rotary)
    kwargs["scaling"] = getattr(self, parts.scale)
    kwargs["dropout"] = getattr(self, parts.dropout, 0.0) if self.training else 0.0
    attended, weights = attend_within(self, *heads, within, kwargs, parts.attend)
    output = getattr(self, parts.output)(attended.view(*hidden_states.shape[:-1], -1))
    if not parts.returns_pair:
        return output
    return output, None if weights is None or parts.weights is None else parts.weights(weights)


def _project(
    layer: Any,
    parts: TowerLayer,
    hidden_states: torch.Tensor,
    rotary: tuple[torch.Tensor, ...] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, key and value, each (N, heads, dimension), from hidden states (N, hidden)."""
    tokens = hidden_states.shape[-2]
    projected = [getattr(layer, name)(hidden_states) for name in parts.inputs]
    # Heads of keys and values may serve several of queries.
    shared = getattr(layer, "num_key_value_heads", layer.num_heads)
    heads = (layer.num_heads, shared, shared)
    if len(projected) == 1:
        query, key, value = projected[0].reshape(tokens, sum(heads), -1).split(heads, dim=1)
    else:
        query, key, value = (
            one.reshape(tokens, count, -1) for one, count in zip(projected, heads, strict=True)
        )
    if parts.norms:
        query_norm, key_norm = (getattr(layer, name) for name in parts.norms)
        query, key = query_norm(query), key_norm(key)
    if rotary is not None:
        query, key = parts.rotate(query, key, *rotary)
    return query, key, value
