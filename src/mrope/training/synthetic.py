"""Random rows of a given shape, to measure training steps with: `data.source: synthetic`."""

from __future__ import annotations

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
        image, clip = [1, *shape.image], [shape.frames, *shape.frame]
        self.template = _tokens(spec, image, clip, shape)
        if len(self.template) > shape.width:
            raise MRopeError(
                f"data.shape: its images and clips take {len(self.template)} tokens, more than "
                f"width={shape.width}"
            )
        self.text = shape.width - len(self.template)
        self.spec = spec
        self.columns: dict[str, torch.Tensor] = {}
        for name, pixels, grid, count in (
            ("image_grid_thw", "pixel_values", image, shape.images),
            ("video_grid_thw", "pixel_values_videos", clip, shape.videos),
        ):
            if count:
                patches = count * grid[0] * grid[1] * grid[2]
                self.columns[name] = torch.tensor([grid] * count)
                # Made once: drawing millions of values for each row would be what is measured.
                self.columns[pixels] = torch.randn(patches, patch_values).to(dtype)

    def __len__(self) -> int:
        return self.rows

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each row, int64 (N,)."""
        return np.full(len(self), len(self.template) + self.text)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        # Seeded by the index, so that a row is the same in every worker and every epoch.
        generator = torch.Generator().manual_seed(index)
        text = torch.randint(10, _VOCABULARY, (self.text,), generator=generator)
        input_ids = torch.cat([torch.tensor(self.template), text])
        types = torch.from_numpy(token_types(self.spec, input_ids.numpy()))
        return {
            "input_ids": input_ids,
            "labels": input_ids.masked_fill(types > 0, -100),
            "mm_token_type_ids": types,
            **self.columns,
        }


def patch_values(vision_config: Any) -> int:
    """Return the number of values of one patch, from a live vision config."""
    size: int = _CHANNELS * vision_config.temporal_patch_size * vision_config.patch_size**2
    return size


def _tokens(spec: MRopeSpec, image: list[int], clip: list[int], shape: ShapeSection) -> list[int]:
    """Return the token ids of a row's images and clips, each span after a vision start token."""
    frames = [[1, *clip[1:]]] * clip[0] if spec.family_row.frames_apart else [clip]
    spans = [(spec.image_token_id, image)] * shape.images
    spans += [(spec.video_token_id, frame) for _ in range(shape.videos) for frame in frames]
    tokens: list[int] = []
    for placeholder, (t, h, w) in spans:
        tokens.append(spec.vision_start_token_id)
        tokens += [placeholder] * (t * h * w // spec.spatial_merge_size**2)
    return tokens
