"""What trainers import that works only beside a CUDA build of torch, made to work without."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch


def import_torchvision() -> None:
    """Import torchvision, if it is installed. Call it before transformers is imported, which does.

    Its compiled operators load only beside a CUDA build of torch. Its import then fails where it
    describes two of them; these are declared here, without an implementation, since nothing that
    is tested calls them.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        arguments = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", arguments)
        importlib.import_module("torchvision")


def decode_by_pillow() -> None:
    """Let transformers decode images by Pillow, where it would by torchvision's operators."""
    from transformers import image_processing_backends as backends
    from transformers.image_utils import load_image

    functional = importlib.import_module("torchvision.transforms.functional")
    backends.load_image_as_tensor = lambda image: functional.pil_to_tensor(load_image(image))


def replace_torchaudio() -> None:
    """Put an empty module in its place, for trainers that import it and here hear nothing."""
    name = "torchaudio"
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__spec__ = ModuleSpec(name, None)
