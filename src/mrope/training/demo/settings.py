"""Build the image processors of a model folder, from the settings that transformers saves there.

transformers 5 saves one `processor_config.json` with a section for each processor; older releases
save `preprocessor_config.json`, and some a `video_preprocessor_config.json` beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Qwen2VLImageProcessorPil

from mrope.errors import MRopeError

_ALL = "processor_config.json"
_IMAGE = "preprocessor_config.json"
_VIDEO = "video_preprocessor_config.json"
_EDGES = ("shortest_edge", "longest_edge")
# Defaults of the video processors' classes: Qwen2VLVideoProcessor in transformers 5.24, and
# Qwen3VLVideoProcessor, whose limits are those of a whole clip.
_VIDEO_OF_FRAMES = {"size": {"shortest_edge": 128 * 28**2, "longest_edge": 768 * 28**2}}
_VIDEO_OF_CLIPS = {
    "size": {"shortest_edge": 128 * 32**2, "longest_edge": 768 * 32**2},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


@dataclass(frozen=True)
class Processors:
    """The processors of a model's images and clips.

    Attributes:
        image: cuts images into patches.
        clip: cuts a clip's frames; it is `image` if the folder has no settings for videos.
        shared: limits of `clip.size` that are those of all frames of a clip together.
    """

    image: Any
    clip: Any
    shared: tuple[str, ...] = ()

    def frame_size(self, frames: int) -> dict[str, int]:
        """Return the limits in pixels of one frame of a clip of so many frames."""
        size = {edge: int(self.clip.size[edge]) for edge in _EDGES}
        # Whole pixels are compared with the limits: the least rounds up, the largest down.
        shares = {
            "shortest_edge": -(-size["shortest_edge"] // frames),
            "longest_edge": size["longest_edge"] // frames,
        }
        return {edge: (shares if edge in self.shared else size)[edge] for edge in _EDGES}


def build_processors(
    folder: Path | None,
    patches: Mapping[str, int],
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    clips_share: bool = False,
) -> Processors:
    """Build the processors of a model's folder.

    Args:
        folder: folder with the settings; None: the defaults of the image processor's class.
        patches: `patch_size`, `temporal_patch_size` and `merge_size` of the model's tower.
        min_pixels, max_pixels: limits of each image and frame, instead of those of the settings.
        clips_share: settings for videos limit whole clips (Qwen3-VL and its kin), not frames.

    Raises:
        MRopeError: the folder has no settings, they cannot be read, or their patches are not those
            of the tower.
    """
    given = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    if folder is None:
        image = _build({}, "the defaults", patches, given)
        return Processors(image, image)
    image = _build(*_read_images(folder), patches, given)
    settings, where = _read_videos(folder)
    if not settings:
        return Processors(image, image)
    settings = (_VIDEO_OF_CLIPS if clips_share else _VIDEO_OF_FRAMES) | settings
    shared = tuple(edge for edge in _EDGES if given[edge] is None) if clips_share else ()
    return Processors(image, _build(settings, where, patches, given), shared)


def _read_images(folder: Path) -> tuple[dict[str, Any], str]:
    section, where = _read_section(folder, "image_processor")
    if section:
        return section, where
    if not (folder / _IMAGE).is_file():
        raise MRopeError(
            f"{folder} has no settings of an image processor: neither {_IMAGE}, nor {_ALL} with an "
            "image_processor section; save the model's processor there"
        )
    return _read(folder / _IMAGE), str(folder / _IMAGE)


def _read_videos(folder: Path) -> tuple[dict[str, Any], str]:
    section, where = _read_section(folder, "video_processor")
    return (section, where) if section else (_read(folder / _VIDEO), str(folder / _VIDEO))


def _read_section(folder: Path, name: str) -> tuple[dict[str, Any], str]:
    """Return a section of `processor_config.json`, empty if it is not there, and its name."""
    where = f"{name} of {folder / _ALL}"
    section = _read(folder / _ALL).get(name) or {}
    if not isinstance(section, dict):
        raise MRopeError(f"{where} must be a section, not {section!r}")
    return section, where


def _read(file: Path) -> dict[str, Any]:
    """Return the settings in a file; empty if there is no such file."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise MRopeError(f"cannot read the processor settings {file}: {error}") from error
    if not isinstance(table, dict):
        raise MRopeError(f"{file} holds no processor settings: its top level is not an object")
    return table


def _build(
    settings: Mapping[str, Any],
    where: str,
    patches: Mapping[str, int],
    limits: Mapping[str, int | None],
) -> Any:
    for key, value in patches.items():
        # Patches of another size would not fit into the tower.
        if settings.get(key, value) not in (value, None):
            raise MRopeError(
                f"{where} has {key}={settings[key]}, but the model's config says {value}: they "
                "belong to different models"
            )
    # Settings for videos have keys, such as the rate of sampling, that are not of this class.
    known = Qwen2VLImageProcessorPil.valid_kwargs.__annotations__
    wanted = {key: settings[key] for key in known if settings.get(key) is not None}
    processor = Qwen2VLImageProcessorPil(**{**wanted, **patches})
    size = {edge: limits[edge] or dict(processor.size).get(edge) for edge in _EDGES}
    if None in size.values():
        raise MRopeError(f"{where}: size must have {' and '.join(_EDGES)}, not {settings['size']}")
    processor.size = size
    return processor
