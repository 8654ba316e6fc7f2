"""How features leave a tower: a function for each kind, which rows of `mrope.hf.rows` name.

Modules behind the tower keep a forward of their own, patched where it goes image by image: hooks on
the module, as FSDP2's, run around its forward alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mrope.columns import NewColumns
from mrope.errors import MRopeError

Features = Callable[[Any, Any, dict[str, Any]], torch.Tensor]
"""(base model, the tower's output, what else the stage added) -> features, (N, hidden)."""

Counts = Callable[[Any, list[list[int]], int], list[int]]
"""(base model, sizes of images or clips, number of features) -> features of each."""

# Patches that MiniCPM-V's mergers make one of.
_MERGED = 4


def pooled(_: Any, output: Any, _taken: NewColumns) -> torch.Tensor:
    """Return the features of a tower that merges patches itself."""
    features: torch.Tensor = output.pooler_output
    return features


def first(_: Any, output: Any, _taken: NewColumns) -> torch.Tensor:
    """Return the features of a tower whose output is a batch of one."""
    features: torch.Tensor = output.pooler_output[0]
    return features


def behind(module: str, *, of: str = "last_hidden_state", **by: str) -> Features:
    """Say that features pass a module behind the tower.

    Args:
        module: its name in the base model.
        of: what of the tower's output it takes.
        by: what else it takes: keywords, and the stage's tensors for them.
    """

    def pass_on(self: object, output: object, taken: NewColumns) -> torch.Tensor:
        more = {keyword: taken[name] for keyword, name in by.items()}
        features: torch.Tensor = getattr(self, module)(getattr(output, of), **more)
        return features

    return pass_on


def kept(self: Any, output: Any, taken: NewColumns) -> torch.Tensor:
    """Project, and keep of a clip what changes, where the worker has said what that is."""
    features: torch.Tensor = self.projector(output.last_hidden_state)
    places = taken.get("feature_index")
    return features if places is None else features.index_select(0, places)


def evenly(_: object, sizes: list[list[int]], total: int) -> list[int]:
    """Return how many features each image or clip has, if all patches count alike.

    Args:
        sizes: frames, height and width of each in patches.
        total: number of features.
    """
    cells = [frames * height * width for frames, height, width in sizes]
    return [total * one // sum(cells) for one in cells]


def evenly_in_pairs(self: object, sizes: list[list[int]], total: int) -> list[int]:
    """Return the same where frames of a clip are joined in pairs, and a last one is left out."""
    return evenly(self, [[max(frames // 2, 1), *size] for frames, *size in sizes], total)


def with_newlines(self: Any, sizes: list[list[int]], total: int) -> list[int]:
    """Return the same where each line ends with a newline, and images may have two more tokens."""
    side = self.config.vision_config.spatial_merge_size
    counts = [t * (h // side) * (w // side + 1) for t, h, w in sizes]
    around = (total - sum(counts)) // len(counts)
    return [count + around for count in counts]


def convolve_frames(
    self: Any,
    hidden_states: torch.Tensor,
    grid_thw: list[list[int]],
    neighbour_offsets: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Convolve all frames by one index; replaces the forward of LFM3-VL's gated convolution.

    transformers goes image by image, by sizes on the host, which have no fixed shape.

    Args:
        self: the layer.
        hidden_states: (P, hidden).
        grid_thw: the sizes, for the layer's own forward.
        neighbour_offsets: int32 (P, K * K), see `mrope.towers.vision.neighbour_offsets`; None: the
            layer's own forward.
        kwargs: of the layer's own forward.

    Raises:
        MRopeError: an adapter stands in place of the convolution, whose weights alone are read.
    """
    if neighbour_offsets is None:
        own: torch.Tensor = type(self).forward(self, hidden_states, grid_thw, **kwargs)
        return own
    if not isinstance(self.spatial_conv, torch.nn.Conv2d):
        raise MRopeError(
            f"{type(self.spatial_conv).__name__} in place of a convolution of the tower is not "
            "supported with fixed shapes, which read its weights alone: leave shapes out"
        )
    before, behind, states = self.in_proj(hidden_states).chunk(3, dim=-1)
    # In float32, as a convolution adds up its taps.
    gated = (before * states).float()
    weights, offsets = self.spatial_conv.weight.flatten(1).unbind(1), neighbour_offsets.unbind(1)
    centre = len(weights) // 2
    place = torch.arange(len(gated), device=gated.device)
    mixed = gated * weights[centre]
    for tap in (one for one in range(len(weights)) if one != centre):
        # Where there is no neighbour the patch itself is read, not one patch by all: gradients of
        # one place are added up one after another.
        neighbour = gated.index_select(0, place + offsets[tap])
        mixed = mixed + torch.where(offsets[tap][:, None] != 0, neighbour, 0) * weights[tap]
    result: torch.Tensor = self.out_proj(behind * mixed.to(states.dtype))
    return result


def merge_patches(self: Any, image_features: torch.Tensor, image_grid_thw: torch.Tensor) -> Any:
    """Merge patches of all images into features; replaces the forward of PaddleOCR-VL's projector.

    The projector's own forward splits by image, whose sizes it reads back from the grids.

    Args:
        self: the projector.
        image_features: (P, hidden), in raster order.
        image_grid_thw: int64 (P,), the order in which blocks of patches are merged. Given grids,
            (images, 3), as from the model's own forward, the projector's own forward is called.
    """
    if image_grid_thw.ndim == 2:
        return type(self).forward(self, image_features, image_grid_thw)
    patches = self.pre_norm(image_features).index_select(0, image_grid_thw)
    across, down = self.merge_kernel_size
    merged = self.linear_1(patches.reshape(-1, across * down * patches.shape[-1]))
    return self.linear_2(self.act(merged))


def pair_frames(
    self: Any,
    hidden_states: torch.Tensor,
    grid_thw: torch.Tensor | None = None,
    pairs: torch.Tensor | None = None,
) -> torch.Tensor:
    """Merge the frames of clips in pairs by index; replaces the forward of ERNIE's resampler.

    transformers makes the pairs from grids that it reads back.

    Args:
        self: the resampler.
        hidden_states: (P, hidden of the tower).
        grid_thw: (images, 3), for the resampler's own forward.
        pairs: int64 (2, M), the merged patches that make up each feature, see
            `mrope.towers.pair_index`; None: the resampler's own forward.

    Returns:
        (M, hidden of the text).
    """
    if pairs is None:
        own: torch.Tensor = type(self).forward(self, hidden_states, grid_thw)
        return own
    frames = self.spatial_linear(hidden_states.reshape(-1, self.spatial_dim))
    joined = torch.cat([frames.index_select(0, half) for half in pairs.unbind()], dim=-1)
    result: torch.Tensor = self.after_norm(self.mlp(self.temporal_linear(joined)))
    return result


def merge_windows(
    self: Any,
    hidden_states: torch.Tensor,
    target_sizes: torch.Tensor,
    window_index: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Merge windows of patches between the tower's layers; replaces the forward of `vit_merger`.

    transformers' own formats the sizes of the crops into a message, whether it is needed or not: a
    sync.

    Args:
        self: the merger within MiniCPM-V's tower.
        hidden_states: (1, P, hidden).
        target_sizes: (crops, 2), for the layer's own forward.
        window_index: int64 (P,), see `mrope.towers.crop_tensors`; None: the layer's own forward.
        kwargs: `cu_window_seqlens`, the borders of the windows, among others.

    Returns:
        (1, P / 4, hidden).
    """
    if window_index is None:
        own: torch.Tensor = type(self).forward(self, hidden_states, target_sizes, **kwargs)
        return own
    normed = self.layer_norm1(hidden_states)[:, window_index, :]
    attended, _ = self.self_attn(
        hidden_states=normed, cu_seqlens=kwargs["cu_window_seqlens"], max_seqlen=_MERGED
    )
    windows = (hidden_states[:, window_index, :] + attended).view(-1, _MERGED, normed.shape[-1])
    merged = self.linear_2(self.act(self.linear_1(self.pre_norm(windows.flatten(1)))))
    result: torch.Tensor = (merged + windows.mean(dim=1)).unsqueeze(0)
    return result


def merge_crops(
    self: Any,
    hidden_states: torch.Tensor,
    target_sizes: torch.Tensor | None = None,
    blocks: torch.Tensor | None = None,
) -> Any:
    """Merge patches of all crops into features by one index; replaces the forward of `merger`.

    Args:
        self: the merger behind MiniCPM-V's tower.
        hidden_states: (1, P, hidden of the tower).
        target_sizes: (crops, 2), for the module's own forward, which goes crop by crop.
        blocks: int64 (P,), see `mrope.towers.crop_tensors`; None: the module's own forward.

    Returns:
        (P / 4, hidden of the text).
    """
    if blocks is None:
        return type(self).forward(self, hidden_states, target_sizes)
    patches = hidden_states[0].index_select(0, blocks)
    return self.mlp[0](patches.view(-1, _MERGED * patches.shape[-1]))
