"""Call the installed transformers' own `get_rope_index`, without building a model.

`mrope.rope_index` must equal it. Parity tests, `mrope check` and `mrope bench positions` call it;
nothing in a worker does.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import types
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from mrope.columns import Columns
from mrope.spec.references import resolve_reference
from mrope.spec.spec import MRopeSpec

# Methods of the model that its `get_rope_index` calls, in one release or another.
_CALLED = (
    "get_vision_position_ids",
    "get_llm_pos_ids_for_vision",
    "get_chunked_index",
    "_group_visual_frames",
    "_frame_end_idx",
)


def installed_reference() -> str:
    """Return the name of the reference that the installed transformers follows."""
    return resolve_reference("auto", transformers.__version__)


# lmms-engine calls Qwen3-VL's function for the first, and for the others where there is none.
_AS_QWEN3_VL = ("aero_realtime", "qwen3_5", "qwen3_5_moe")


def has_rope_index(family: str) -> bool:
    """Whether the installed transformers has a function that positions can be compared with."""
    name = _module_name(family)
    return name in _AS_QWEN3_VL or _find_module(name) is not None


def reference_class(family: str) -> Any:
    """Return transformers' own model class whose `get_rope_index` is the rule of `family`.

    For aero_realtime, and for qwen3_5 in releases without it, that is the class of Qwen3-VL:
    lmms-engine calls its function for both.

    Raises:
        ModuleNotFoundError: the installed transformers does not have the family.
    """
    name = _module_name(family)
    if name in _AS_QWEN3_VL and _find_module(name) is None:
        name = "qwen3_vl"
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    classes = (one for one in vars(module).values() if isinstance(one, type))
    found = [
        one
        for one in classes
        if one.__module__ == module.__name__ and "get_rope_index" in vars(one)
    ]
    # A talker without a function of its own inherits the thinker's.
    return next((one for one in found if _is_talker(family) and "Talker" in one.__name__), found[0])


def _module_name(family: str) -> str:
    return family.removesuffix("_thinker").removesuffix("_talker")


def _is_talker(family: str) -> bool:
    return family.endswith("_talker")


def _find_module(name: str) -> Any:
    return importlib.util.find_spec(f"transformers.models.{name}")


def reference_rope_index(
    spec: MRopeSpec, arguments: Columns
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Compute position ids and rope deltas by the installed transformers.

    Args:
        spec: of the model; its reference is ignored.
        arguments: of `mrope.rope_index` by name. `mm_token_type_ids` must be among them:
            transformers requires it from 5.3 on. Arrays are converted to tensors.

    Returns:
        `position_ids` int64 (3, B, S) and `rope_deltas` int64 (B, 1).
    """
    model = reference_class(spec.family)
    if _is_talker(spec.family) and _sums_mask(model, arguments):
        return _by_forward(model, arguments)
    # Building a model would allocate its weights; the function only reads `self.config`.
    holder = _holder(spec)
    for name in _CALLED:
        function = inspect.getattr_static(model, name, None)
        if isinstance(function, staticmethod):
            setattr(holder, name, function.__func__)
        elif function is not None:
            setattr(holder, name, types.MethodType(function, holder))
    tensors = {name: _tensor(value) for name, value in arguments.items()}
    # Release 4.57 has no such parameter, and neither has the function of some custom rules.
    typed = spec.family_row.custom_index is None or "mm_token_type_ids" in spec.family_row.inputs
    if installed_reference() == "transformers-4.57" or not typed:
        tensors.pop("mm_token_type_ids", None)
    if "audio_seqlens" in spec.family_row.inputs:
        # The thinkers' own name for it.
        tensors["second_per_grids"] = tensors.pop("second_per_grid_ts", None)
    elif spec.tokens_per_second is None:
        tensors.pop("second_per_grid_ts", None)
    if spec.family_row.custom_index is not None:
        # `rope_index` takes counts per row, which transformers' functions lack except GLM-Image's.
        taken = inspect.signature(model.get_rope_index).parameters
        tensors = {name: value for name, value in tensors.items() if name in taken}
    position_ids, rope_deltas = model.get_rope_index(holder, **tensors)
    return position_ids.numpy(), rope_deltas.numpy()


def _sums_mask(model: object, arguments: Columns) -> bool:
    """Whether a talker's forward, without image, clip and audio, calls no `get_rope_index`."""
    media = ("image_grid_thw", "video_grid_thw", "audio_seqlens")
    return "compute_3d_position_ids" in vars(model) and all(arguments.get(m) is None for m in media)


def _by_forward(
    model: Any, arguments: Columns
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Compute positions of text as a talker's forward does; deltas less the padding are undone."""
    holder = types.SimpleNamespace(rope_deltas=None)
    ids, mask = (_tensor(arguments[name]) for name in ("input_ids", "attention_mask"))
    mask = torch.ones_like(ids) if mask is None else mask
    position_ids = model.compute_3d_position_ids(holder, ids, ids, mask)
    rope_deltas = holder.rope_deltas + (1 - mask).sum(1, keepdim=True)
    return position_ids.numpy(), rope_deltas.numpy()


def _holder(spec: MRopeSpec) -> types.SimpleNamespace:
    """Return an object with a model's config, which has a spec's values under all their names."""
    numbers = types.SimpleNamespace(
        spatial_merge_size=spec.spatial_merge_size,
        tokens_per_second=spec.tokens_per_second,
        **spec.extra,
    )
    config = types.SimpleNamespace(
        image_token_id=spec.image_token_id,
        video_token_id=spec.video_token_id,
        vision_start_token_id=spec.vision_start_token_id,
        image_start_token_id=spec.vision_start_token_id,
        image_start_id=spec.vision_start_token_id,
        downsample_mode="4x" if spec.spatial_merge_size == 2 else "16x",
        vision_config=numbers,
        audio_config=numbers,
        text_config=types.SimpleNamespace(
            rope_parameters={"mrope_section": [1] * int(spec.extra.get("axes", 3))}
        ),
        **spec.extra,
    )
    return types.SimpleNamespace(config=config, spatial_merge_size=spec.spatial_merge_size)


def _tensor(value: object) -> Any:
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
