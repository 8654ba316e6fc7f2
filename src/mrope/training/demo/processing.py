"""Turn conversations into columns, as a Qwen processor does, without torchvision.

transformers' own processors of these families cannot be built without torchvision, since they hold
a video processor that needs it. Its PIL image processor is used here for images and, frame by
frame, for clips. Placeholders are expanded here.

Shape suffixes: F frames, N temporal positions (pairs of frames), P patches of a frame, C channels,
X pixels of a patch in one channel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
from PIL import Image
from transformers import AutoTokenizer

from mrope.errors import MRopeError
from mrope.positions.spans import token_types
from mrope.spec.spec import MRopeSpec
from mrope.training.demo.messages import in_order, read_messages
from mrope.training.demo.pictures import read_frames, read_picture
from mrope.training.demo.settings import Processors, build_processors
from mrope.training.demo.tokenizer import CHAT_TEMPLATE, build_tokenizer

IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
START, END = "<|vision_start|>", "<|vision_end|>"
_CHANNELS = 3

Pixels = npt.NDArray[np.float32]
Grids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Processing:
    """Turn one row of `messages`, `images`, `videos` and `fps` into the columns of a batch.

    Attributes:
        spec: of the model.
        tokenizer: with Qwen's special tokens under the ids of the spec, and a chat template.
        processors: cut images and clips into the model's patches.
        fps: frames per second of clips in rows without `fps`.
        folder: what relative paths of pictures are relative to.
    """

    spec: MRopeSpec
    tokenizer: Any
    processors: Processors
    fps: float = 2.0
    folder: Path = Path()

    @property
    def image_processor(self) -> Any:
        """The processor of images, whose patch sizes are the tower's."""
        return self.processors.image

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        """Return the row's columns; those of a modality that it lacks are empty.

        Raises:
            MRopeError: a message or item is not understood, the row's messages and pictures differ
                in number, or a picture cannot be read.
        """
        try:
            return self._columns(row)
        except MRopeError as error:
            raise MRopeError(f"row {index} of the dataset: {error}") from error

    def features(self) -> datasets.Features:
        """Return the types of the columns, for `Dataset.map`."""
        processor = self.image_processor
        width = _CHANNELS * processor.temporal_patch_size * processor.patch_size**2
        tokens = datasets.List(datasets.Value("int64"))
        pixels = datasets.Array2D((None, width), "float32")
        names = ("input_ids", "attention_mask", "labels", "mm_token_type_ids")
        columns: dict[str, Any] = dict.fromkeys(names, tokens)
        columns |= {"pixel_values": pixels, "pixel_values_videos": pixels}
        columns |= {
            "image_grid_thw": datasets.List(tokens),
            "video_grid_thw": datasets.List(tokens),
        }
        if self.spec.family_row.timed:
            columns["second_per_grid_ts"] = datasets.List(datasets.Value("float32"))
        return datasets.Features(columns)

    def _columns(self, row: Mapping[str, Any]) -> dict[str, Any]:
        talk = read_messages(row.get("messages"))
        shown = in_order(talk.images, row.get("images") or [])
        images = [read_picture(value, self.folder) for value in shown]
        shown = in_order(talk.videos, row.get("videos") or [])
        clips = [read_frames(value, self.folder) for value in shown]
        fps = row.get("fps") or self.fps
        pixel_values, image_grid_thw = self._patches(images)
        pixel_values_videos, video_grid_thw = self._clip_patches(clips)
        # Placeholders are expanded in the text, so that the tokenizer sees the whole of it once.
        text = self.tokenizer.apply_chat_template(talk.messages, tokenize=False)
        text = _expand(text, IMAGE, [self._tokens(grid) * IMAGE for grid in image_grid_thw])
        text = _expand(text, START + VIDEO + END, [self._clip(g, fps) for g in video_grid_thw])
        columns = self._token_columns(text)
        columns |= {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw}
        columns |= {"pixel_values_videos": pixel_values_videos, "video_grid_thw": video_grid_thw}
        # Other families' forwards do not know the key.
        if self.spec.family_row.timed:
            seconds = self.image_processor.temporal_patch_size / fps
            columns["second_per_grid_ts"] = [seconds] * len(clips)
        return columns

    def _token_columns(self, text: str) -> dict[str, Any]:
        ids = np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)
        types = token_types(self.spec, ids)
        return {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "labels": np.where(types == 0, ids, -100),  # -100: ignored by the loss
            "mm_token_type_ids": types,
        }

    def _patches(
        self, pictures: Sequence[Image.Image], processor: Any = None, **options: Any
    ) -> tuple[Pixels, Grids]:
        """Return the patches of pictures, (patches, C * 2 * X), and their grids, (n, 3)."""
        if not pictures:
            width = _CHANNELS * self.image_processor.temporal_patch_size
            width *= self.image_processor.patch_size**2
            return np.empty((0, width), np.float32), np.empty((0, 3), np.int64)
        processor = processor or self.image_processor
        out = processor(images=list(pictures), return_tensors="np", **options)
        return out["pixel_values"], out["image_grid_thw"]

    def _clip_patches(self, clips: Sequence[Sequence[Image.Image]]) -> tuple[Pixels, Grids]:
        made = [self._one_clip(frames) for frames in clips] or [self._patches([])]
        return np.concatenate([pixels for pixels, _ in made]), np.concatenate([g for _, g in made])

    def _one_clip(self, frames: Sequence[Image.Image]) -> tuple[Pixels, Grids]:
        """Return the patches of one clip and its grid, (1, 3).

        A patch of a clip holds `temporal_patch_size` frames, one per temporal slot. The image
        processor fills all slots with the same picture. So every frame is processed as a picture,
        and slot k of a group is then taken from the group's frame k. An incomplete last group
        repeats the last frame.
        """
        depth = self.image_processor.temporal_patch_size
        padded = [*frames, *[frames[-1]] * (-len(frames) % depth)]
        size = self.processors.frame_size(len(padded))
        pixels, grids = self._patches(padded, self.processors.clip, size=size)
        groups, height, width = len(padded) // depth, *grids[0, 1:]
        pixels_NFPCFX = pixels.reshape(groups, depth, height * width, _CHANNELS, depth, -1)
        slot = np.arange(depth)
        # numpy puts the axis of two separated index arrays first: (F, N, P, C, X). It goes back
        # behind C, where the model expects the slots of a patch.
        clip_FNPCX = pixels_NFPCFX[:, slot, :, :, slot]
        clip = np.moveaxis(clip_FNPCX, 0, 3).reshape(groups * height * width, -1)
        return clip, np.array([[groups, height, width]], np.int64)

    def _tokens(self, grid: npt.NDArray[np.int64]) -> int:
        return int(grid.prod()) // self.spec.spatial_merge_size**2

    def _clip(self, grid: npt.NDArray[np.int64], fps: float) -> str:
        """Return the text of a clip: one span, or a span with its time for each group of frames."""
        if not self.spec.family_row.frames_apart:
            return START + VIDEO * self._tokens(grid) + END
        span = START + VIDEO * self._tokens(grid[1:]) + END
        depth = self.image_processor.temporal_patch_size
        # The time of a group is the mean of the times of its first and last frame.
        times = [(depth * number + (depth - 1) / 2) / fps for number in range(grid[0])]
        return "".join(f"<{time:.1f} seconds>{span}" for time in times)


def build_processing(
    spec: MRopeSpec,
    model_config: Any,
    *,
    folder: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    fps: float = 2.0,
    pictures: Path = Path(),
) -> Processing:
    """Build the processing of a model's rows.

    Args:
        spec: of the model.
        model_config: its live config, for the patch sizes of the vision tower.
        folder: folder with a tokenizer and the settings of its processors: a
            `processor_config.json` or a `preprocessor_config.json`. None: the demo's tokenizer and
            the image processor's defaults.
        min_pixels, max_pixels, fps: as in the config's `data` section.
        pictures: folder that relative paths of pictures are relative to.

    Raises:
        MRopeError: the tokenizer or the settings are not those of the model, or the folder has no
            settings.
    """
    vision = model_config.vision_config
    sizes = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    source = Path(folder) if folder else None
    processors = build_processors(
        source,
        sizes,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        clips_share=spec.family_row.frames_apart,
    )
    tokenizer = _tokenizer(source)
    whose = "the tokenizer" if source else "no folder with a tokenizer is given, and the demo's"
    _check_tokenizer(tokenizer, whose, spec, model_config.get_text_config().vocab_size)
    return Processing(spec, tokenizer, processors, fps, pictures)


def _tokenizer(folder: Path | None) -> Any:
    if folder is None:
        return build_tokenizer()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    return tokenizer


def _check_tokenizer(tokenizer: Any, whose: str, spec: MRopeSpec, vocab_size: int) -> None:
    """Raise if the ids of special tokens or the vocabulary are not those of the model."""
    wanted = {
        IMAGE: spec.image_token_id,
        VIDEO: spec.video_token_id,
        START: spec.vision_start_token_id,
    }
    for token, id_ in wanted.items():
        found = tokenizer.convert_tokens_to_ids(token)
        if found != id_:
            raise MRopeError(
                f"{whose} has {token} as {found}, but the model's config says {id_}: they belong "
                "to different models; the model's own is in its folder"
            )
    if len(tokenizer) > vocab_size:
        raise MRopeError(f"{whose} has {len(tokenizer)} entries, but vocab_size is {vocab_size}")


def _expand(text: str, placeholder: str, expanded: Sequence[str]) -> str:
    """Replace each placeholder in a text by its own expansion.

    Raises:
        MRopeError: placeholders and expansions differ in number.
    """
    parts = re.split(re.escape(placeholder), text)
    if len(parts) - 1 != len(expanded):
        kind = "images" if placeholder == IMAGE else "videos"
        raise MRopeError(
            f"its messages show {len(parts) - 1} {kind}, but its column holds {len(expanded)} "
            f"({placeholder} typed as text counts too)"
        )
    return parts[0] + "".join(map("".join, zip(expanded, parts[1:], strict=True)))
