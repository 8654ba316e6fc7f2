"""Forwards of models whose towers take images one by one: HunYuan-VL, V4 too, and GLM-Image.

Their own forwards read the sizes of every image back from the device. Here they come from a list in
the batch, `image_grid_sizes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import can_return_tuple

from mrope.collate.layouts import to_model_layout
from mrope.hf.forwards import (
    Places,
    Tensors,
    forward_with,
    host_grids,
    is_precomputed,
    run_text_model,
    token_embeddings,
    tower_inputs,
    vision_tower,
)


@can_return_tuple  # type: ignore[untyped-decorator]
def sized_forward(self: Any, **inputs: Any) -> Any:
    """Forward of HunYuan-VL and HunYuan V4 VL: positions and merging go image by image."""
    return forward_with(self, inputs, _encode_sized)


@can_return_tuple  # type: ignore[untyped-decorator]
def codebook_forward(self: Any, **inputs: Any) -> Any:
    """Forward of GLM-Image: an image becomes token ids, which replace its placeholders."""
    inputs = to_model_layout(inputs)
    if not is_precomputed(self, inputs):
        return type(self).forward(self, **inputs)
    encoded = {}
    # What its own forward reads to tell the images with pixels from those to be drawn.
    inputs.pop("images_per_sample", None)
    if inputs.get("pixel_values") is not None:
        places, encoded["image"] = _encode_by_codebook(self, inputs)
        ids = inputs["input_ids"]
        tokens = torch.cat(encoded["image"].image_tokens).to(ids.dtype)
        inputs["input_ids"] = ids.flatten().index_copy(0, places, tokens).view_as(ids)
    return run_text_model(self, token_embeddings(self, inputs), inputs, encoded)


def _encode_sized(self: Any, modality: str, inputs: Tensors) -> tuple[Places, Any]:
    places, pixels, grid_thw, known = tower_inputs(self, modality, inputs)
    grid_thw = host_grids(modality, inputs, grid_thw)
    output = vision_tower(self)(pixels, grid_thw=grid_thw, return_dict=True, **known)
    output.pooler_output = output.pooler_output[0]  # the tower's batch is one
    return places, output


def _encode_by_codebook(self: Any, inputs: Tensors) -> tuple[Places, Any]:
    """Run the tower, and look up the nearest code of every patch, (patches,) for each image."""
    cu_seqlens = inputs["image_cu_seqlens"]
    places, pixels, _, known = tower_inputs(self, "image", inputs)
    if not isinstance(known["cu_seqlens"], torch.Tensor):
        # The tower computes with the tensor, and passes nothing besides to its layers.
        cu_seqlens.mrope_borders = known["cu_seqlens"]
        known["cu_seqlens"] = cu_seqlens
    sizes = inputs.pop("image_grid_sizes")
    grid_thw = inputs.pop("image_source_grids")
    output = vision_tower(self)(pixels, grid_thw=grid_thw, return_dict=True, **known)
    patches = torch.split(output.pooler_output, [t * h * w for t, h, w in sizes])
    # (frames * hidden, height, width) of each image, as the codebook takes them.
    output.pooler_output = [
        one.view(*size, -1).permute(0, 3, 1, 2).flatten(0, 1).contiguous()
        for one, size in zip(patches, sizes, strict=True)
    ]
    output.image_tokens = [
        self.vqmodel.encode(one[None]).image_tokens for one in output.pooler_output
    ]
    return places, output


IMAGE_FORWARDS: dict[str, Callable[..., Any]] = {
    "glm_image": codebook_forward,
    "hunyuan_vl": sized_forward,
    "hy_v4_vl": sized_forward,
}
