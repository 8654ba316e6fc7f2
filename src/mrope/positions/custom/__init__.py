"""Rules that differ in kind from the one of `mrope.positions.rope_index`: a function each, found by its name.

A family names its rule in `Family.custom_index`. The functions check their inputs themselves, number a
whole batch, and share nothing but the way in: `custom_rope_index`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy.typing as npt

from mrope.arrays import as_array
from mrope.positions.custom.glm_image import glm_image_index
from mrope.positions.custom.hunyuan import hunyuan_index
from mrope.positions.custom.minicpm import minicpm_index
from mrope.positions.custom.omni import omni_2_5_index, omni_3_index
from mrope.spec.spec import MRopeSpec

Positions = tuple[npt.NDArray[Any], npt.NDArray[Any]]
Rule = Callable[..., Positions]

CUSTOM_INDICES: dict[str, Rule] = {
    "glm_image": glm_image_index,
    "hunyuan": hunyuan_index,
    "minicpm": minicpm_index,
    "omni_2_5": omni_2_5_index,
    "omni_3": omni_3_index,
}


def custom_rope_index(
    spec: MRopeSpec, input_ids: npt.ArrayLike, given: Mapping[str, Any]
) -> Positions:
    """Call the rule of the spec's family with those of the given inputs that it takes.

    Raises:
        TypeError: an input that is given, and that the family does not take.
        MRopeError: from the rule.
    """
    common = ("attention_mask", "image_grid_thw", "video_grid_thw")
    known = {*common, *spec.family_row.inputs}
    unknown = [name for name, value in given.items() if value is not None and name not in known]
    # A processor may give more than a rule reads: types, or how many grids a row has.
    unread = {"mm_token_type_ids", "images_per_sample", "videos_per_sample", "second_per_grid_ts"}
    if set(unknown) - unread:
        raise TypeError(f"{spec.family} takes no {', '.join(sorted(set(unknown) - unread))}")
    assert spec.family_row.custom_index is not None  # the caller asked
    inputs = {name: given[name] for name in known if given.get(name) is not None}
    return CUSTOM_INDICES[spec.family_row.custom_index](
        spec, as_array("input_ids", input_ids, "token ids"), **inputs
    )
