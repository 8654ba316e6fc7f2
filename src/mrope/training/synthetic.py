"""Random rows of a given shape, to measure training steps with: `data.source: synthetic`."""

from __future__ import annotations

from itertools import count, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from mrope.errors import MRopeError
from mrope.positions.sample_rows import Medium, Part, make_row, medium_tokens, refuse_custom_layouts
from mrope.spec.families import NO_TOKEN
from mrope.training.sizes import Sizes, as_sizes, count_columns

if TYPE_CHECKING:
    from mrope.spec.spec import MRopeSpec
    from mrope.training.sections import ShapeSection

_CHANNELS = 3
# Ids of text are random, from this one on, without those of special tokens.
_FIRST_TEXT_ID = 10
_TEXT_IDS = 90


class SyntheticRows(Dataset[dict[str, torch.Tensor]]):
    """Rows of images, clips, then random text up to a width; sizes are fixed, or drawn.

    Args:
        spec: of the model.
        shape: how many images and clips a row has, of what size, and its tokens.
        rows: length of the dataset.
        patch_shape: shape of one patch, see `patch_shape`.
        dtype: of the pixels, which are random, and the same in every row.

    Raises:
        MRopeError: the images and clips do not fit into the width, or their sides are no multiples
            of `spatial_merge_size`; the family has no clips, or its tokens are laid out by a rule
            of their own.
    """

    def __init__(
        self,
        spec: MRopeSpec,
        shape: ShapeSection,
        rows: int,
        patch_shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        self.rows = rows
        self.spec = spec
        self.shape = shape
        refuse_custom_layouts(spec)
        _check_shape(spec, shape)
        self.text_ids = torch.tensor(_text_ids(spec))
        merged = int(spec.extra.get("temporal_merge_size", 1))
        self.clips = [[shape.frames * merged, *shape.frame]] * shape.videos
        if shape.image_sides is None:
            media = self._media([[1, *shape.image]] * shape.images)
            self._text_length(media, shape.least_width or shape.width)
        largest = shape.image if shape.image_sides is None else [shape.image_sides[1]] * 2
        # Made once: drawing millions of values for each row would be what is measured.
        self.pixels = {
            "image": torch.randn(_patches([[1, *largest]] * shape.images), *patch_shape).to(dtype),
            "video": torch.randn(_patches(self.clips), *patch_shape).to(dtype),
        }

    def __len__(self) -> int:
        return self.rows

    def sizes(self, workers: int = 0, skip: bool = False) -> Sizes:
        """Return the sizes of all rows; the arguments are those of `Rows.sizes`."""
        del workers, skip
        sizes = [count_columns(self.spec, self[row]) for row in range(len(self))]
        return as_sizes(np.array(sizes, np.int64))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        # Seeded by the index, so that a row is the same in every worker and every epoch.
        generator = torch.Generator().manual_seed(index)
        images = self._images(generator)
        media = self._media(images)
        width, least = self.shape.width, self.shape.least_width
        if least is not None:
            width = int(torch.randint(least, width + 1, (), generator=generator))
        length = self._text_length(media, width)
        text = self.text_ids[torch.randint(_TEXT_IDS, (length,), generator=generator)]
        made = make_row(self.spec, [*media, text.tolist()])
        row = {name: torch.from_numpy(value) for name, value in made.items()}
        for kind, pixels, grids in (
            ("image", "pixel_values", images),
            ("video", "pixel_values_videos", self.clips),
        ):
            if grids:
                row[pixels] = self.pixels[kind][: _patches(grids)]
        return row

    def _images(self, generator: torch.Generator) -> list[list[int]]:
        """Return the grids of a row's images: all of one size, or drawn between two sides."""
        if self.shape.image_sides is None:
            return [[1, *self.shape.image]] * self.shape.images
        merge = self.spec.spatial_merge_size
        low, high = (side // merge for side in self.shape.image_sides)
        sides = torch.randint(low, high + 1, (self.shape.images, 2), generator=generator) * merge
        return [[1, height, width] for height, width in sides.tolist()]

    def _media(self, images: list[list[int]]) -> list[Part]:
        """Return a row's images and clips, in the form of `make_row`."""
        text = [int(self.text_ids[0])]
        gap = (text * (self.spec.family_row.frame_gap or 0)).copy
        media = [Medium("image", (1, height, width)) for _, height, width in images]
        media += [Medium("video", (t, h, w), gap) for t, h, w in self.clips]
        # Without a start marker text: transformers takes adjacent spans of one kind for one.
        apart = [text] if self.spec.vision_start_token_id == NO_TOKEN else []
        parts: list[Part] = []
        for medium in media:
            parts += [*apart, medium]
        return parts

    def _text_length(self, media: list[Part], width: int) -> int:
        """Return the tokens that are left for text beside the media, which must fit the width."""
        tokens = sum(
            len(medium_tokens(self.spec, part) if isinstance(part, Medium) else part)
            for part in media
        )
        if tokens > width:
            raise MRopeError(
                f"data.shape: its images and clips take {tokens} tokens, more than width={width}"
            )
        return width - tokens


def patch_shape(spec: MRopeSpec, vision_config: Any) -> tuple[int, ...]:
    """Return the shape of one patch's pixels, from a live vision config: its values in a row.

    PaddleOCR-VL's processor alone keeps (channels, height, width).
    """
    side = vision_config.patch_size
    tower = spec.family_row.tower
    if tower is not None and tower.patch == "image":
        return _CHANNELS, side, side
    return (_CHANNELS * getattr(vision_config, "temporal_patch_size", 1) * side**2,)


def _text_ids(spec: MRopeSpec) -> list[int]:
    """Return ids that stand for nothing but text."""
    special = {spec.image_token_id, spec.video_token_id, spec.vision_start_token_id}
    special |= {int(value) for name, value in spec.extra.items() if name.endswith("_id")}
    plain = (token for token in count(_FIRST_TEXT_ID) if token not in special)
    return list(islice(plain, _TEXT_IDS))


def _check_shape(spec: MRopeSpec, shape: ShapeSection) -> None:
    row, merge = spec.family_row, spec.spatial_merge_size
    if shape.videos and not row.has_videos:
        raise MRopeError(f"data.shape: videos={shape.videos}, but {spec.family} has no videos")
    for name, used in (("image", shape.images), ("frame", shape.videos)):
        sides = getattr(shape, name)
        if used and any(side % merge for side in sides):
            raise MRopeError(
                f"data.shape: {name} must hold multiples of spatial_merge_size={merge}, not {sides}"
            )
    if shape.image_sides is not None and shape.image_sides[0] < merge:
        raise MRopeError(
            f"data.shape: image_sides must be at least spatial_merge_size={merge}, not "
            f"{shape.image_sides}"
        )


def _patches(grids: list[list[int]]) -> int:
    return sum(t * h * w for t, h, w in grids)
