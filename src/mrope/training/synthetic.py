"""Random rows of a given shape, to measure training steps with: `data.source: synthetic`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from mrope.errors import MRopeError
from mrope.positions.spans import token_types

if TYPE_CHECKING:
    from mrope.spec.spec import MRopeSpec
    from mrope.training.sections import ShapeSection

_CHANNELS = 3
# Ids of text are random from 10 to here, below every special token's of the bench configs.
_VOCABULARY = 100


class SyntheticRows(Dataset[dict[str, torch.Tensor]]):
    """Rows that differ only in their text: images, clips, then random text up to a width.

    Args:
        spec: of the model.
        shape: how many images and clips a row has, of what size, and its tokens.
        rows: length of the dataset.
        patch_values: values of one patch: channels x frames x height x width.
        dtype: of the pixels, which are random, and the same in every row.

    Raises:
        MRopeError: the images and clips do not fit into the width.
    """

    def __init__(
        self,
        spec: MRopeSpec,
        shape: ShapeSection,
        rows: int,
        patch_values: int,
        dtype: torch.dtype,
    ) -> None:
        self.rows = rows
        self.spec = spec
        self.shape = shape
        self.clips = [[shape.frames, *shape.frame]] * shape.videos
        if shape.image_sides is None:
            self._text_length([[1, *shape.image]] * shape.images)
        largest = shape.image if shape.image_sides is None else [shape.image_sides[1]] * 2
        # Made once: drawing millions of values for each row would be what is measured.
        self.pixels = {
            "image": torch.randn(_patches([[1, *largest]] * shape.images), patch_values).to(dtype),
            "video": torch.randn(_patches(self.clips), patch_values).to(dtype),
        }

    def __len__(self) -> int:
        return self.rows

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each row, int64 (N,)."""
        return np.full(len(self), self.shape.width)

    def patches(self) -> npt.NDArray[np.int64]:
        """Return the number of patches of each row, images and clips together, int64 (N,)."""
        return np.array([_patches(grids) for grids in self._grids()])

    def patch_pairs(self) -> npt.NDArray[np.int64]:
        """Return the sum of squared patches over the images and frames of each row, int64 (N,)."""
        return np.array([sum(t * (h * w) ** 2 for t, h, w in grids) for grids in self._grids()])

    def _grids(self) -> Iterator[list[list[int]]]:
        for row in range(len(self)):
            yield [*self._images(torch.Generator().manual_seed(row)), *self.clips]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        # Seeded by the index, so that a row is the same in every worker and every epoch.
        generator = torch.Generator().manual_seed(index)
        images = self._images(generator)
        template = torch.tensor(_tokens(self.spec, images, self.clips), dtype=torch.int64)
        length = self._text_length(images)
        text = torch.randint(10, _VOCABULARY, (length,), generator=generator)
        input_ids = torch.cat([template, text])
        types = torch.from_numpy(token_types(self.spec, input_ids.numpy()))
        row = {
            "input_ids": input_ids,
            "labels": input_ids.masked_fill(types > 0, -100),
            "mm_token_type_ids": types,
        }
        for kind, pixels, grids in (
            ("image", "pixel_values", images),
            ("video", "pixel_values_videos", self.clips),
        ):
            if grids:
                row[f"{kind}_grid_thw"] = torch.tensor(grids)
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

    def _text_length(self, images: list[list[int]]) -> int:
        tokens = len(_tokens(self.spec, images, self.clips))
        if tokens > self.shape.width:
            raise MRopeError(
                f"data.shape: its images and clips take {tokens} tokens, more than "
                f"width={self.shape.width}"
            )
        return self.shape.width - tokens


def patch_values(vision_config: Any) -> int:
    """Return the number of values of one patch, from a live vision config."""
    size: int = _CHANNELS * vision_config.temporal_patch_size * vision_config.patch_size**2
    return size


def _patches(grids: list[list[int]]) -> int:
    return sum(t * h * w for t, h, w in grids)


def _tokens(spec: MRopeSpec, images: list[list[int]], clips: list[list[int]]) -> list[int]:
    """Return the token ids of a row's images and clips, each span after a vision start token."""
    spans = [(spec.image_token_id, image) for image in images]
    for clip in clips:
        frames = [[1, *clip[1:]]] * clip[0] if spec.family_row.frames_apart else [clip]
        spans += [(spec.video_token_id, frame) for frame in frames]
    tokens: list[int] = []
    for placeholder, (t, h, w) in spans:
        tokens.append(spec.vision_start_token_id)
        tokens += [placeholder] * (t * h * w // spec.spatial_merge_size**2)
    return tokens
