"""Rules for families whose position ids differ in kind from the kernel's.

A rule numbers the tokens of a stream, as `mrope.positions.kernel` does for all other families. What
stands at padding, and rope deltas, are computed once for all of them, by `rope_index`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy.typing as npt

from mrope.positions.custom.centred import number_centred, number_middle, number_planes
from mrope.positions.custom.counted import number_counted
from mrope.positions.custom.glm_image import glm_image_tokens, number_glm_image
from mrope.positions.custom.hunyuan import hunyuan_tokens, number_hunyuan
from mrope.positions.custom.minicpm import number_minicpm
from mrope.positions.custom.omni import number_omni_2_5, number_omni_3, number_omni_3_talker
from mrope.positions.located import Located
from mrope.spec.spec import MRopeSpec

Array = npt.NDArray[Any]


class Padding(NamedTuple):
    """What stands at padding, and what of it counts in rope deltas.

    Attributes:
        fill: position written at padding.
        fill_counts: the largest position of a row with padding includes that fill.
        empty_end: the end of a row without a token, in place of its largest position + 1.
        over_padded: a delta is over the padded length, in place of the row's own tokens.
    """

    fill: int
    fill_counts: bool = False
    empty_end: int = 0
    over_padded: bool = False


class Rule(NamedTuple):
    """The rule of one or more families.

    Attributes:
        number: `(spec, located) -> (positions (A, T), ends (D,))`, see `rope_index.number`.
        padding: of its batches.
        text: of batches without images and clips; None: the same.
        image_tokens: tokens of an image of a made-up row, by frames, height and width in patches;
            None: a start marker and placeholders.
        silent: of batches without audio too, where `Reference.talker_sums_mask`; None: the same.
    """

    number: Callable[[MRopeSpec, Located], tuple[Array, Array]]
    padding: Padding = Padding(0)
    text: Padding | None = None
    image_tokens: Callable[[MRopeSpec, int, int, int], list[int]] | None = None
    silent: Padding | None = None


# The thinkers' text branch takes the maximum over the fill at padding too.
_OMNI_TEXT = Padding(1, fill_counts=True)

RULES: dict[str, Rule] = {
    "centred": Rule(number_centred),
    "counted": Rule(number_counted),
    "glm_image": Rule(number_glm_image, Padding(1), image_tokens=glm_image_tokens),
    "hunyuan": Rule(number_hunyuan, image_tokens=hunyuan_tokens),
    "middle": Rule(number_middle),
    "minicpm": Rule(number_minicpm, Padding(0, empty_end=1)),
    "omni_2_5": Rule(number_omni_2_5, Padding(1), _OMNI_TEXT),
    "omni_3": Rule(number_omni_3, Padding(0), _OMNI_TEXT),
    "omni_3_talker": Rule(number_omni_3_talker, Padding(0), _OMNI_TEXT, silent=Padding(0)),
    "planes": Rule(number_planes),
}
