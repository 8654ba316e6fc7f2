"""Lay out the tokens of images and clips, as the processors of a family do."""

from __future__ import annotations

from mrope.errors import MRopeError
from mrope.spec.families import NO_TOKEN
from mrope.spec.spec import MRopeSpec


def image_tokens(spec: MRopeSpec, height: int, width: int) -> list[int]:
    """Return the token ids of an image: a start marker, if the family has one, and placeholders.

    Args:
        height, width: of the image, in patches.

    Raises:
        MRopeError: the family's tokens are laid out by a rule of their own.

    Example:
        >>> from mrope.spec.spec import example_config
        >>> spec = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
        >>> image_tokens(spec, 4, 4)
        [101, 102, 102, 102, 102]
    """
    return _span(spec, spec.image_token_id, spec.frame_tokens(height, width))


def clip_tokens(
    spec: MRopeSpec, frames: int, height: int, width: int, text_id: int = 0
) -> list[int]:
    """Return the token ids of a clip, with a start marker before it or before each frame.

    Args:
        frames: temporal patches of the clip.
        height, width: of each frame, in patches.
        text_id: stands between frames where the family's rule counts on tokens there.

    Raises:
        MRopeError: the family's tokens are laid out by a rule of their own.
    """
    row, area = spec.family_row, spec.frame_tokens(height, width)
    frames //= int(spec.extra.get("temporal_merge_size", 1))
    # The frames of a family with newline tokens stand side by side.
    spans = [area] * frames if row.frames_apart and not row.newlines else [frames * area]
    placeholder = spec.image_token_id if row.frames_as_images else spec.video_token_id
    gap = [text_id] * (row.frame_gap or 0)
    tokens = [token for span in spans for token in (*gap, *_span(spec, placeholder, span))]
    tokens = tokens[len(gap) :]
    if not row.frames_as_images:
        return tokens
    start, end = (int(spec.extra[f"video_{name}_token_id"]) for name in ("start", "end"))
    return [start, *tokens, end]


def _span(spec: MRopeSpec, placeholder: int, tokens: int) -> list[int]:
    if spec.family_row.custom_index is not None:
        raise MRopeError(
            f"no sample of {spec.family} can be made up, whose tokens are laid out by a rule of "
            "their own; give a dataset"
        )
    start = spec.vision_start_token_id
    return [*([] if start == NO_TOKEN else [start]), *[placeholder] * tokens]
