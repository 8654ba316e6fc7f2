"""Draw a mix of text, images of many sizes and clips, and build rows of it.

The mix of `python -m measure balance` and of `tests/measure/ranks.py`: 30 % text alone, 50 % with
one to four images, 20 % with a clip. Sizes are log-normal. They are of no public dataset: their
medians make the vision tower about half of the work with Qwen3-VL-2B's shape.

Shape suffixes: N examples, G grids of images and clips.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from mrope.positions.sample_rows import Medium, Part, make_row

if TYPE_CHECKING:
    from mrope.spec.spec import MRopeSpec

IntArray = npt.NDArray[np.int64]

FULL_BUDGET = 16384
_TEXT, _IMAGES = 0.3, 0.5  # shares of the examples; clips are the rest
_MERGE = 2  # patches along a side of a merged token
# Tokens beside the placeholders: start and end of each image or frame, and a frame's time.
_AROUND, _TIME = 2, 6
# Medians at the full budget, and sigmas of the logarithm.
_TEXT_TOKENS, _PROMPT_TOKENS = (600, 1.0), (200, 0.8)
_IMAGE_TOKENS, _FRAME_TOKENS = (900, 0.8), (250, 0.5)
_FRAMES = (12, 0.6)
_ASPECT = 0.3
# Largest image and frame, as a share of the budget: four images and their prompt fit.
_LARGEST = 5
# Ids of text are random below this, and below every special token's.
_VOCABULARY = 100
_END = 9  # in place of the end of an image, which no spec has


@dataclass(frozen=True)
class Mix:
    """Hold the layout of examples.

    Attributes:
        text_N: int64 (N,), tokens that are neither placeholders nor around them.
        grids_G3: int64 (G, 3), frames, height and width in patches, example after example.
        borders: int64 (N + 1,), where each example's grids begin and end.
        clip_N: bool (N,), whether an example's grid is that of a clip.
    """

    text_N: IntArray
    grids_G3: IntArray
    borders: IntArray
    clip_N: npt.NDArray[np.bool_]

    def tokens(self) -> IntArray:
        """Return the tokens of each example, placeholders included, int64 (N,)."""
        frames, height, width = self.grids_G3.T
        clip_G = np.repeat(self.clip_N, np.diff(self.borders))
        each_G = height * width // _MERGE**2 + _AROUND + clip_G * _TIME
        return self.text_N + self._sum(frames * each_G)

    def visual_tokens(self) -> IntArray:
        """Return the placeholders of each example, int64 (N,)."""
        return self.patches() // _MERGE**2

    def patches(self) -> IntArray:
        """Return the patches of each example, int64 (N,)."""
        return self._sum(self.grids_G3.prod(axis=1))

    def patch_pairs(self) -> IntArray:
        """Return the sum of squared patches over images and frames, int64 (N,)."""
        frames, height, width = self.grids_G3.T
        return self._sum(frames * (height * width) ** 2)

    def segments(self) -> IntArray:
        """Return the images and frames of each example, int64 (N,)."""
        return self._sum(self.grids_G3[:, 0])

    def _sum(self, values_G: IntArray) -> IntArray:
        ends = np.concatenate(([0], values_G.cumsum()))
        sums: IntArray = np.diff(ends[self.borders])
        return sums


def make_mix(examples: int, budget: int = FULL_BUDGET, seed: int = 0) -> Mix:
    """Draw examples, none of more tokens than the budget; sizes are proportional to it.

    Args:
        examples: their number.
        budget: tokens of a batch, at least 256.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    scale = budget / FULL_BUDGET
    kind_N = rng.choice(3, examples, p=(_TEXT, _IMAGES, 1 - _TEXT - _IMAGES))
    count_N = np.where(kind_N == 1, rng.integers(1, 5, examples), kind_N == 2)
    clip_G = np.repeat(kind_N == 2, count_N)
    area_G = np.where(
        clip_G, *(_draw(rng, *sizes, len(clip_G)) for sizes in (_FRAME_TOKENS, _IMAGE_TOKENS))
    )
    sides_2G = _sides(rng, area_G * scale, budget // _LARGEST)
    # A clip is cut to the frames that fit, with one token of text.
    frame_tokens_G = sides_2G.prod(axis=0) + _AROUND + _TIME
    frames_G = np.clip(_draw(rng, *_FRAMES, len(clip_G)), 2, 64).astype(np.int64)
    frames_G = np.where(clip_G, np.minimum(frames_G, (budget - 1) // frame_tokens_G), 1)
    text_N = np.where(
        kind_N == 0, *(_draw(rng, *sizes, examples) for sizes in (_TEXT_TOKENS, _PROMPT_TOKENS))
    )
    mix = Mix(
        np.zeros(examples, np.int64),
        np.stack((frames_G, *_MERGE * sides_2G), axis=1),
        np.concatenate(([0], count_N.cumsum())),
        kind_N == 2,
    )
    most_N = budget - mix.tokens()
    text_N = np.clip(text_N * scale, 1, most_N).astype(np.int64)
    return Mix(text_N, mix.grids_G3, mix.borders, mix.clip_N)


def _draw(
    rng: np.random.Generator, median: float, sigma: float, count: int
) -> npt.NDArray[np.float64]:
    return rng.lognormal(np.log(median), sigma, count)


def _sides(rng: np.random.Generator, area_G: npt.NDArray[np.float64], largest: int) -> IntArray:
    """Return heights and widths in merged tokens, int64 (2, G), each area at most `largest`."""
    area_G = np.minimum(area_G, largest)
    aspect_G = _draw(rng, 1, _ASPECT, len(area_G))
    # Rounded down, so that the product stays below the area; at least one token.
    sides = np.sqrt(np.stack((area_G * aspect_G, area_G / aspect_G)))
    return np.maximum(sides, 1).astype(np.int64)


class MixRows(Dataset[dict[str, torch.Tensor]]):
    """Build tokenized rows of a mix, with random text and pixels.

    Args:
        mix: the layout.
        spec: of a Qwen3-VL.
        pixels: (P, values of a patch), as many patches as the largest example has; rows have views
            of it. Drawing values for each row would take longer than a training step.
    """

    def __init__(self, mix: Mix, spec: MRopeSpec, pixels: torch.Tensor) -> None:
        self.mix, self.spec, self.pixels = mix, spec, pixels

    def __len__(self) -> int:
        return len(self.mix.text_N)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        grids = self.mix.grids_G3[slice(*self.mix.borders[index : index + 2])]
        row = {
            name: torch.from_numpy(value)
            for name, value in make_row(self.spec, self._parts(index, grids)).items()
        }
        if len(grids):
            name = "pixel_values_videos" if self.mix.clip_N[index] else "pixel_values"
            row[name] = self.pixels[: int(grids.prod(axis=1).sum())]
        return row

    def _parts(self, index: int, grids: IntArray) -> list[Part]:
        # Seeded by the index, so that a row is the same in every process and epoch.
        rng = np.random.default_rng(index)

        def text(count: int) -> list[int]:
            ids: list[int] = rng.integers(10, _VOCABULARY, count).tolist()
            return ids

        parts: list[Part] = []
        for frames, height, width in grids.tolist():
            size = (frames, height, width)
            if self.mix.clip_N[index]:
                parts += [text(_TIME), Medium("video", size, lambda: [_END, *text(_TIME)]), [_END]]
            else:
                parts += [Medium("image", size), [_END]]
        return [*parts, text(int(self.mix.text_N[index]))]
