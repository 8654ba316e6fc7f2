"""Position ids of families whose rule the kernel cannot compute: a function for each of them.

A family names its function in `Family.custom_index`. Each takes a checked batch whose spans are not
found yet (`Located.spans` is None), finds and checks them, and returns position ids and rope deltas
of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy.typing as npt

from mrope.positions.custom.counted import counted_index
from mrope.positions.custom.glm_image import glm_image_index
from mrope.positions.custom.hunyuan import hunyuan_index
from mrope.positions.custom.minicpm import minicpm_index
from mrope.positions.custom.omni import omni_2_5_index, omni_3_index
from mrope.positions.located import Located
from mrope.spec.spec import MRopeSpec

CustomIndex = Callable[[MRopeSpec, Located], tuple[npt.NDArray[Any], npt.NDArray[Any]]]

CUSTOM_INDICES: dict[str, CustomIndex] = {
    "counted": counted_index,
    "glm_image": glm_image_index,
    "hunyuan": hunyuan_index,
    "minicpm": minicpm_index,
    "omni_2_5": omni_2_5_index,
    "omni_3": omni_3_index,
}
