"""Put features in the places of their tokens, by index."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mrope.columns import NewColumns


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
Level = tuple[Places, list[torch.Tensor]]
"""Where the features of a tower's deeper layers go, and these features."""


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


def deepstack_inputs(levels: list[Level]) -> NewColumns:
    """Return what a text model adds to its first layers: deeper features of each tower call.

    The text model passes both on to `_deepstack_process` unread, so that an index can take the
    place of the mask: `add_deepstack` replaces that method.
    """
    places: list[Any] = [index for index, _ in levels]
    features = zip(*(features for _, features in levels), strict=True)
    return {
        "visual_pos_masks": places[0] if len(places) == 1 else torch.cat(places),
        "deepstack_visual_embeds": [torch.cat(level) for level in features],
    }


def add_deepstack(
    self: Any, hidden_states: torch.Tensor, index: Places, features: torch.Tensor
) -> torch.Tensor:
    """Add feature rows to the tokens at flat indices; replaces `_deepstack_process`.

    Args:
        self: the text model.
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
