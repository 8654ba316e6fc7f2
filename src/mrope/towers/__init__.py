"""Tensors that a vision or audio tower would derive from sizes, computed in the worker."""

from __future__ import annotations

from mrope.towers.audio import AudioSpec, audio_tensors, audio_tokens, padded_features
from mrope.towers.crops import crop_tensors
from mrope.towers.vision import block_index, pair_index, vision_tensors
from mrope.towers.vision_spec import VisionSpec, check_release

__all__ = [
    "AudioSpec",
    "VisionSpec",
    "audio_tensors",
    "audio_tokens",
    "block_index",
    "check_release",
    "crop_tensors",
    "padded_features",
    "pair_index",
    "vision_tensors",
]
