"""Make up rows of a dataset: the tokens of images and clips as a family's processor lays them out.

The layouts of families with a rule of their own stand beside that rule, in `positions/custom/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from mrope.arrays import IntArray
from mrope.errors import MRopeError
from mrope.positions.custom import RULES
from mrope.positions.spans import token_types
from mrope.spec.families import NO_TOKEN
from mrope.spec.spec import MRopeSpec

# Called for the token ids between two frames that stand apart.
Gap = Callable[[], Sequence[int]]


@dataclass(frozen=True)
class Medium:
    """An image or a clip of a made-up row.

    Attributes:
        kind: "image" or "video".
        size: frames, height and width in patches, as a row of `*_grid_thw`.
        gap: see `clip_tokens`.
    """

    kind: str
    size: tuple[int, int, int]
    gap: Gap | None = None


Part: TypeAlias = Medium | Sequence[int]


def make_row(spec: MRopeSpec, parts: Sequence[Part]) -> dict[str, IntArray]:
    """Return a row of media and text, as a processor would make it, without pixels.

    Args:
        parts: in their order, images and clips, and token ids of the text between.

    Returns:
        `input_ids`, `labels` (-100 at placeholders) and `mm_token_type_ids`, int64 (S,);
        `image_grid_thw` and `video_grid_thw`, int64 (N, 3), where the row has any; and
        `moe_mm_token_type_ids` for families whose experts read it.

    Example:
        >>> from mrope.spec.spec import example_config
        >>> spec = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
        >>> row = make_row(spec, [[7], Medium("image", (1, 4, 4)), [8, 9]])
        >>> row["input_ids"].tolist(), row["image_grid_thw"].tolist()
        ([7, 101, 102, 102, 102, 102, 8, 9], [[1, 4, 4]])
    """
    tokens: list[int] = []
    grids: dict[str, list[tuple[int, int, int]]] = {"image": [], "video": []}
    for part in parts:
        if isinstance(part, Medium):
            grids[part.kind].append(part.size)
            tokens += medium_tokens(spec, part)
        else:
            tokens += part
    ids = np.array(tokens, np.int64)
    types = token_types(spec, ids)
    row = {"input_ids": ids, "labels": np.where(types > 0, -100, ids), "mm_token_type_ids": types}
    tower = spec.family_row.tower
    if tower is not None and "pairs" in tower.tensors:
        # ERNIE's experts for images and clips take the start markers too.
        row["moe_mm_token_type_ids"] = types | (ids == spec.vision_start_token_id)
    return row | {f"{kind}_grid_thw": np.array(sizes) for kind, sizes in grids.items() if sizes}


def medium_tokens(spec: MRopeSpec, medium: Medium) -> list[int]:
    """Return the token ids of an image or a clip."""
    if medium.kind == "image":
        frames, height, width = medium.size
        return image_tokens(spec, height, width, frames)
    return clip_tokens(spec, *medium.size, medium.gap)


def image_tokens(spec: MRopeSpec, height: int, width: int, frames: int = 1) -> list[int]:
    """Return the token ids of an image: a start marker, if the family has one, and placeholders.

    Args:
        height, width: of the image, in patches.
        frames: temporal patches; some families take more than one for an image.

    Example:
        >>> from mrope.spec.spec import example_config
        >>> spec = MRopeSpec.from_config(example_config("qwen3_vl"), "transformers-5.23")
        >>> image_tokens(spec, 4, 4)
        [101, 102, 102, 102, 102]
    """
    rule = RULES.get(spec.family_row.custom_index or "")
    if rule is not None and rule.image_tokens is not None:
        return rule.image_tokens(spec, frames, height, width)
    return _span(spec, spec.image_token_id, frames * spec.frame_tokens(height, width))


def clip_tokens(
    spec: MRopeSpec, frames: int, height: int, width: int, gap: Gap | None = None
) -> list[int]:
    """Return the token ids of a clip, with a start marker before it or before each frame.

    Args:
        frames: temporal patches of the clip.
        height, width: of each frame, in patches.
        gap: called for the tokens between two frames that stand apart; None: as few text tokens
            as the family's rule counts on, of id 0.
    """
    row, area = spec.family_row, spec.frame_tokens(height, width)
    frames //= int(spec.extra.get("temporal_merge_size", 1))
    # The frames of a family with newline tokens stand side by side.
    apart = row.frames_apart and not row.newlines
    placeholder = spec.image_token_id if row.frames_as_images else spec.video_token_id
    fewest = [0] * (row.frame_gap or 0)
    tokens = _span(spec, placeholder, area if apart else frames * area)
    for _ in range(frames - 1 if apart else 0):
        tokens += [*(fewest if gap is None else gap()), *_span(spec, placeholder, area)]
    if not row.frames_as_images:
        return tokens
    start, end = (int(spec.extra[f"video_{name}_token_id"]) for name in ("start", "end"))
    return [start, *tokens, end]


def refuse_custom_layouts(spec: MRopeSpec) -> None:
    """Refuse a family whose rows have more than tokens, grids and pixels.

    Raises:
        MRopeError: the family has a rule of its own.
    """
    if spec.family_row.custom_index is not None:
        raise MRopeError(
            f"no sample of {spec.family} can be made up, whose tokens are laid out by a rule of "
            "their own; give a dataset"
        )


def _span(spec: MRopeSpec, placeholder: int, tokens: int) -> list[int]:
    start = spec.vision_start_token_id
    return [*([] if start == NO_TOKEN else [start]), *[placeholder] * tokens]
