"""For each rule of `mrope.positions.custom`: random batches for it, and its slow twin."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from mrope import MRopeSpec
from positions.custom import test_glm_image as glm_image
from positions.custom import test_hunyuan as hunyuan
from support.omni import random_omni_batch
from twins import minicpm
from twins.omni import slow_omni_index

Batch = dict[str, Any]

RANDOM: dict[str, Callable[[random.Random, MRopeSpec], Batch]] = {
    "omni_2_5": random_omni_batch,
    "omni_3": random_omni_batch,
    "omni_3_talker": random_omni_batch,
    "glm_image": lambda rng, _: glm_image.random_batch(rng),
    "hunyuan": lambda rng, spec: hunyuan.random_batch(rng, spec.spatial_merge_size),
    "minicpm": lambda rng, spec: minicpm.random_batch(rng, spec.spatial_merge_size),
}
SLOW: dict[str, Callable[[MRopeSpec, Batch], tuple[Any, Any]]] = {
    "omni_2_5": slow_omni_index,
    "omni_3": slow_omni_index,
    "omni_3_talker": slow_omni_index,
    "glm_image": lambda _, batch: glm_image.slow_index(batch),
    "hunyuan": hunyuan.slow_index,
    "minicpm": lambda spec, batch: minicpm.slow_index(spec.spatial_merge_size, batch),
}
