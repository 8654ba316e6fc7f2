"""Load a model's own processor, from its folder alone."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from mrope.errors import MRopeError
from mrope.spec.families import NO_TOKEN
from mrope.spec.spec import MRopeSpec

_EDGES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}


def load_processor(folder: str, trust_remote_code: bool = False) -> Any:
    """Return `AutoProcessor.from_pretrained(folder)`, without a download.

    Raises:
        MRopeError: the folder holds no processor, or torchvision is missing or broken.
    """
    from transformers import AutoProcessor

    auto: Any = AutoProcessor
    try:
        processor = auto.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    # Whatever a missing package or a damaged file raises first.
    except Exception as error:
        raise MRopeError(_describe_failure(folder, error)) from error
    if not hasattr(processor, "tokenizer"):
        # Without a processor of its own, a folder's tokenizer is returned.
        raise MRopeError(_describe_failure(folder, "it holds a tokenizer alone"))
    if processor.chat_template is None:
        raise MRopeError(f"the processor in {folder} has no chat template; save one there")
    return processor


def limit_pixels(processor: Any, limits: dict[str, int | None], *, clips: bool) -> None:
    """Set the limits that images, and with `clips` also frames, are scaled into."""
    parts = [processor.image_processor, *([processor.video_processor] if clips else [])]
    for part in parts:
        given = {_EDGES[name]: value for name, value in limits.items() if value is not None}
        if given:
            part.size = {edge: part.size[edge] for edge in _EDGES.values()} | given


def check_processor(processor: Any, whose: str, spec: MRopeSpec, model_config: Any) -> None:
    """Raise an `MRopeError` unless tokens, vocabulary and patches are those of the model."""
    tokenizer = processor.tokenizer
    for name in ("image_token_id", "video_token_id"):
        wanted, token = getattr(spec, name), getattr(processor, name.removesuffix("_id"), None)
        if wanted == NO_TOKEN or token is None:
            continue
        found = tokenizer.convert_tokens_to_ids(token)
        if found != wanted:
            raise MRopeError(
                f"{whose} has {token} as {found}, but the model's config says {wanted}: they "
                "belong to different models; the model's own is in its folder"
            )
    size = model_config.get_text_config().vocab_size
    if len(tokenizer) > size:
        raise MRopeError(f"{whose} has {len(tokenizer)} entries, but vocab_size is {size}")
    patch = getattr(processor.image_processor, "patch_size", None)
    side = getattr(model_config.vision_config, "patch_size", None)
    if isinstance(patch, int) and isinstance(side, int) and patch != side:
        raise MRopeError(
            f"{whose} has patch_size={patch}, but the model's config says {side}: they belong to "
            "different models"
        )


def _describe_failure(folder: str, error: Exception | str) -> str:
    import torch

    release = f"its release for torch {torch.__version__}"
    if importlib.util.find_spec("torchvision") is None:
        return (
            f"the processor in {folder} needs torchvision, which is not installed: pip install "
            f"torchvision ({release})"
        )
    try:
        importlib.import_module("torchvision")
    except Exception as broken:  # noqa: BLE001 - a build for another torch raises RuntimeError
        reason = str(broken).partition("\n")[0]
        return (
            f"the processor in {folder} needs torchvision, which is installed but cannot be "
            f"imported ({reason}): install {release}"
        )
    reason = str(error).strip().partition("\n")[0]
    return f"no processor can be loaded from {Path(folder)}: {reason}"
