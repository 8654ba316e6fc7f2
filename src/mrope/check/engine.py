"""Compare positions with those of an installed serving engine: `mrope doctor --engine sglang`.

A policy answers from the engine's positions, and is trained at ours. The engine's function is plain
torch: its file is loaded by itself, since the package around it needs a GPU to be imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from mrope.columns import NewColumns
from mrope.errors import MRopeError
from mrope.positions.rope_index import rope_index
from mrope.proof.random_batches import random_arguments
from mrope.spec.families import FAMILIES
from mrope.spec.spec import MRopeSpec, example_config

_FILES = {"sglang": "srt/layers/rotary_embedding/mrope_rope_index.py"}
_SIZES = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
_BATCHES = 400
_NO_RULE = "no rule of its own"


def compare_engine(engine: str, reference: str = "auto") -> dict[str, dict[str, str]]:
    """Return for each family that an engine numbers "equal", or the first row that differs.

    Rows are random and alone: with images, and with clips too. Empty: the engine is not installed.

    Raises:
        MRopeError: an engine that cannot be asked.
    """
    if engine not in _FILES:
        raise MRopeError(f"--engine must be one of {', '.join(_FILES)}, not {engine!r}")
    package = importlib.util.find_spec(engine)
    if package is None or package.origin is None:
        return {}
    module = ModuleType("engine_rope_index")
    source = (Path(package.origin).parent / _FILES[engine]).read_text(encoding="utf-8")
    exec(compile(source, _FILES[engine], "exec"), vars(module))
    found: dict[str, dict[str, str]] = {}
    for family, row in FAMILIES.items():
        # The engine finds spans by their start markers.
        if row.custom_index is None and row.start_keys and reference in ("auto", *row.references):
            spec = MRopeSpec.from_config(example_config(family), reference)
            verdicts = {
                kind: _compare(module, spec, kind == "clips") for kind in ("images", "clips")
            }
            found |= {} if set(verdicts.values()) == {_NO_RULE} else {family: verdicts}
    return found


def _numbers(module: ModuleType, spec: MRopeSpec, ids_1S: Any, sizes: NewColumns) -> Any:
    """Call SGLang's function for a family; RuntimeError or AttributeError: it has none."""
    vision = SimpleNamespace(spatial_merge_size=spec.spatial_merge_size)
    if spec.family_row.frames_as_images:
        config = SimpleNamespace(
            image_token_id=spec.image_token_id, vision_config=vision, **spec.extra
        )
        grids = (sizes.get(name) for name in _SIZES[:2])
        return module.get_rope_index_glm4v(ids_1S, config, *grids, torch.ones_like(ids_1S))[0]
    return module.get_rope_index(
        spatial_merge_size=spec.spatial_merge_size,
        image_token_id=spec.image_token_id,
        video_token_id=spec.video_token_id,
        vision_start_token_id=spec.vision_start_token_id,
        model_type=spec.family,
        tokens_per_second=spec.tokens_per_second or 1,
        input_ids=ids_1S,
        **sizes,
    )[0]


def _compare(module: ModuleType, spec: MRopeSpec, clips: bool) -> str:
    verdict = _NO_RULE
    for ids, sizes in random_rows(spec, clips):
        ours, _ = rope_index(spec, ids, **sizes)
        tensors = {name: torch.as_tensor(value) for name, value in sizes.items()}
        try:
            theirs = _numbers(module, spec, torch.as_tensor(ids), tensors).numpy()
        except (AttributeError, RuntimeError):
            return _NO_RULE
        if not np.array_equal(ours, theirs):
            axis, _, token = np.argwhere(ours != theirs)[0]
            given = "".join(f", {name} {value.tolist()}" for name, value in sizes.items())
            return (
                f"token {token} of {ids.shape[1]} is at {theirs[axis, 0, token]} on axis {axis}, "
                f"here at {ours[axis, 0, token]}{given}"
            )
        verdict = "equal"
    return verdict


def random_rows(spec: MRopeSpec, clips: bool) -> Iterator[tuple[Any, NewColumns]]:
    """Yield token ids (1, S) and sizes of random rows without padding; an image has one frame."""
    rng = np.random.default_rng(0)
    for _ in range(_BATCHES):
        given = random_arguments(spec, rng)
        sizes = {name: given[name] for name in _SIZES if given.get(name) is not None}
        still = (sizes.get("image_grid_thw", np.ones((1, 3)))[:, 0] == 1).all()
        if (
            len(given["input_ids"]) == 1
            and still
            and sizes
            and ("video_grid_thw" in sizes) == clips
        ):
            mask = given["attention_mask"]
            yield given["input_ids"] if mask is None else given["input_ids"][:, mask[0] != 0], sizes
