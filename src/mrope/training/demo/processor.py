"""Build a processor for the demo, without torchvision: transformers' own, around small parts.

Text, placeholders, times and seconds are transformers'; only clips are cut here, since its video
processors need torchvision.

Shape suffixes: F frames, N temporal positions (pairs of frames), P patches of a frame, C channels,
X pixels of a patch in one channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import transformers
from PIL import Image
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from mrope.columns import NewColumns
from mrope.errors import MRopeError
from mrope.training.demo.tokenizer import CHAT_TEMPLATE, build_tokenizer

_CHANNELS = 3
_EDGES = ("shortest_edge", "longest_edge")


@dataclass  # its repr is part of the name of a file of counts
class FramesAsPictures:
    """Cut clips into patches, frame by frame, as the image processor cuts pictures."""

    image_processor: Any

    def __post_init__(self) -> None:
        self.merge_size = self.image_processor.merge_size
        self.temporal_patch_size = self.image_processor.temporal_patch_size
        self.size = {edge: self.image_processor.size[edge] for edge in _EDGES}

    def __call__(
        self, videos: Sequence[Sequence[Image.Image]], video_metadata: Any = None, **_: Any
    ) -> NewColumns:
        """Return patches (patches, C * 2 * X) and grids (clips, 3) of clips, and their metadata."""
        from transformers.video_utils import VideoMetadata

        made = [self._cut(frames) for frames in videos]
        return {
            "pixel_values_videos": np.concatenate([pixels for pixels, _ in made]),
            "video_grid_thw": np.array([grid for _, grid in made]),
            "video_metadata": [VideoMetadata(**one) for one in video_metadata],
        }

    def get_num_of_video_patches(self, frames: int, height: int, width: int, _: object) -> int:
        """Return the number of patches of a clip of this size."""
        limits = {"min_pixels": self.size["shortest_edge"], "max_pixels": self.size["longest_edge"]}
        each = self.image_processor.get_number_of_image_patches(height, width, limits)
        return int(-(-frames // self.temporal_patch_size) * each)

    def _cut(self, frames: Sequence[Image.Image]) -> tuple[Any, list[int]]:
        """Return the patches of one clip and its grid.

        A patch holds `temporal_patch_size` frames, and the image processor fills them all with one
        picture: frame k of a group is taken from slot k of its own patches. An incomplete last
        group repeats the last frame.
        """
        depth = self.temporal_patch_size
        padded = [*frames, *[frames[-1]] * (-len(frames) % depth)]
        out = self.image_processor(images=padded, return_tensors="np", size=self.size)
        pixels, grids = out["pixel_values"], out["image_grid_thw"]
        groups, height, width = len(padded) // depth, *(int(side) for side in grids[0, 1:])
        pixels_NFPCFX = pixels.reshape(groups, depth, height * width, _CHANNELS, depth, -1)
        # The diagonal of both axes F, as the model expects a patch: slots behind channels.
        clip_NPCFX = np.einsum("nfpcfx->npcfx", pixels_NFPCFX)
        clip = clip_NPCFX.reshape(groups * height * width, -1)
        return clip, [groups, height, width]


def demo_processor(model_type: str, patches: Mapping[str, int]) -> Any:
    """Return the processor of a model type with the demo's tokenizer.

    Args:
        model_type: of the model's config.
        patches: `patch_size`, `temporal_patch_size` and `merge_size` of the model's tower.

    Raises:
        MRopeError: the family's processor is not one of Qwen's.
    """
    own: Any = getattr(transformers, str(PROCESSOR_MAPPING_NAMES.get(model_type)), None)
    if own is None or "Qwen" not in own.__name__:
        raise MRopeError(
            f"the demo has no processor for {model_type}: set data.processor to a folder with the "
            "model's own"
        )
    image_processor = transformers.Qwen2VLImageProcessorPil(**patches)
    kind = type("Processor", (own,), {"check_argument_for_proper_class": lambda *_: None})
    clips = FramesAsPictures(image_processor)
    return kind(image_processor, build_tokenizer(), clips, chat_template=CHAT_TEMPLATE)
