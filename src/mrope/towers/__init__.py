"""Tensors that a vision or audio tower would derive from sizes, computed in the worker."""

from __future__ import annotations

from mrope.towers.audio import AudioSpec, audio_tensors, audio_tokens, padded_features
from mrope.towers.vision import (
    PRODUCTS,
    block_index,
    pair_index,
    products_of,
    tower_tensors,
    vision_tensors,
)
from mrope.towers.vision_spec import VisionSpec, check_release

__all__ = [
    "PRODUCTS",
    "AudioSpec",
    "VisionSpec",
    "audio_tensors",
    "audio_tokens",
    "block_index",
    "check_release",
    "padded_features",
    "pair_index",
    "products_of",
    "tower_tensors",
    "vision_tensors",
]
