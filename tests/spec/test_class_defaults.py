"""A config that lacks what equals the default of transformers' class is read as transformers reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from mrope import MRopeError, MRopeSpec, VisionSpec
from mrope.spec import FAMILIES, ONE_DIMENSIONAL, resolve_reference
from mrope.spec.class_defaults import CLASS_DEFAULTS, WRAPPERS, Defaults
from mrope.towers import AudioSpec
from support.fresh import run_python
from support.specs import NEWEST as NEW

transformers = pytest.importorskip("transformers")

# What the classes have no default for, and every checkpoint has.
GIVEN: dict[str, dict[str, Any]] = {
    "qwen2_5_omni_thinker": {"vision_start_token_id": 151652},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 151652},
    "qwen3_omni_moe_talker": {"spatial_merge_size": 2},
    "hunyuan_vl": {
        "text_config": {
            "hidden_size": 64,
            "num_attention_heads": 2,
            "head_dim": 32,
            "rope_parameters": {"rope_theta": 1e4, "mrope_section": [4, 4, 4, 4]},
        }
    },
    "minicpmv4_7": {
        "image_token_id": 1,
        "video_token_id": 2,
        "image_start_id": 3,
        "image_end_id": 4,
        "slice_start_id": 5,
        "slice_end_id": 6,
        "newline_id": 7,
    },
}
INSTALLED = [name for name in CLASS_DEFAULTS if name in transformers.CONFIG_MAPPING]


def live_config(family: str) -> Any:
    return transformers.AutoConfig.for_model(family, **GIVEN.get(family, {}))


def specs(config: Any) -> list[Any]:
    """Return every spec that the config gives; a message where it gives none."""

    def read(kind: Any, *reference: str) -> Any:
        try:
            return kind.from_config(config, *reference)
        except MRopeError as error:
            return str(error)

    return [read(MRopeSpec, NEW), read(VisionSpec), read(AudioSpec)]


def test_every_family_with_a_class_in_transformers_has_defaults() -> None:
    released = {name for name, row in FAMILIES.items() if row.source is None}
    assert set(CLASS_DEFAULTS) == (released | set(ONE_DIMENSIONAL)) - {"aero_realtime"}


@pytest.mark.parametrize("family", INSTALLED)
def test_the_table_holds_what_the_classes_hold(family: str) -> None:
    def equal(defaults: Defaults, table: Mapping[str, Any]) -> None:
        for key, value in defaults.items():
            if isinstance(value, Mapping):
                equal(value, table[key])
            else:
                assert value == table[key.split("|")[0]], key

    equal(CLASS_DEFAULTS[family], transformers.AutoConfig.for_model(family).to_dict())


def paths(table: Mapping[str, Any], *above: str) -> Iterator[tuple[str, ...]]:
    """Yield the path of every key, sections themselves and the keys in them."""
    for key, value in table.items():
        yield (*above, key)
        if isinstance(value, Mapping):
            yield from paths(value, *above, key)


def at(table: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        table = table.get(key, KeyError) if isinstance(table, Mapping) else KeyError
    return table


def without(table: Mapping[str, Any], *gone: tuple[str, ...]) -> dict[str, Any]:
    """Return a deep copy of a config without the keys at these paths."""
    copy = json.loads(json.dumps(table))
    for path in gone:
        section = at(copy, path[:-1])
        if isinstance(section, dict):
            section.pop(path[-1], None)
    return dict(copy)


def removable(family: str, saved: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the paths in a saved config whose values its class would fill in by itself."""
    default = transformers.AutoConfig.for_model(family).to_dict()
    # EXAONE's class fails to read a text section without one.
    kept = [("model_type",), ("text_config", "model_type")]
    equal = [path for path in paths(saved) if at(saved, path) == at(default, path)]
    return [path for path in equal if path not in kept]


@pytest.mark.parametrize("family", INSTALLED)
def test_keys_at_their_default_can_be_left_out(family: str, tmp_path: Path) -> None:
    config = live_config(family)
    want = specs(config)
    assert any(not isinstance(spec, str) for spec in want)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert specs(tmp_path) == want
    gone = removable(family, saved)
    for path in gone:
        assert specs(without(saved, path)) == want, path
    (tmp_path / "config.json").write_text(json.dumps(without(saved, *gone)))
    assert specs(tmp_path) == want
    # transformers itself reads the same from what is left.
    assert specs(transformers.AutoConfig.from_pretrained(tmp_path)) == want


@pytest.mark.parametrize("family", INSTALLED)
def test_a_given_value_wins_over_the_default(family: str) -> None:
    saved = json.loads(json.dumps(live_config(family).to_dict(), default=str))
    saved["vision_config"] = {"spatial_merge_size": 4, "patch_size": 7}
    saved["spatial_merge_size"] = 4  # a talker's
    rows = [FAMILIES[family]] if family in FAMILIES else []
    for row in rows:
        image = next(key for key in row.image_keys if key in saved)
        spec = MRopeSpec.from_config(saved | {image: 77}, NEW)
        assert spec.image_token_id == 77
        assert spec.spatial_merge_size == 4 or row.merges is not None
    tower = specs(saved)[1]
    assert (
        isinstance(tower, str)
        or tower.spatial_merge_size == 4
        or tower.tower.sizes in ("merged_in_batch", "crops")
    )


IDS = ("image_token_id", "video_token_id", "vision_start_token_id")


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v"])
@pytest.mark.parametrize("ids", [(151655, 151656, 151652), (31, 32, 33)])
def test_ids_in_the_text_config_are_left_to_transformers(
    family: str, ids: tuple[int, ...], tmp_path: Path
) -> None:
    """No class reads an id from there: without one at the top, its own default is the model's."""
    config = {"model_type": family, "text_config": dict(zip(IDS, ids, strict=True))}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert specs(tmp_path) == specs(transformers.AutoConfig.from_pretrained(tmp_path))
    assert isinstance(specs(tmp_path)[0], MRopeSpec)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl_moe", "paddleocr_vl"])
def test_every_form_of_a_config_gives_the_same_spec(family: str, tmp_path: Path) -> None:
    config = live_config(family)
    want = specs(config)
    config.save_pretrained(tmp_path)
    mixed = {**config.to_dict(), "vision_config": config.vision_config}
    text = (tmp_path / "config.json").read_text()
    forms = [tmp_path, tmp_path / "config.json", text, f"\n {text}", config.to_json_string(), mixed]
    assert all(specs(form) == want for form in forms)
    assert VisionSpec.from_config(config.vision_config) == want[1]
    bare = {"model_type": config.vision_config.model_type}
    assert VisionSpec.from_config(bare) == want[1]


@pytest.mark.parametrize("inner", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", None])
def test_a_wrapped_config_is_read_where_the_wrapped_model_is(
    inner: str | None, tmp_path: Path
) -> None:
    table = {} if inner is None else {"vlm_config": {"model_type": inner, "image_token_id": 9}}
    config = transformers.AutoConfig.for_model("colqwen2", **table)
    want = specs(config.vlm_config)
    assert want[0].family == (inner or "qwen2_vl")
    config.save_pretrained(tmp_path)
    live = {"model_type": "colqwen2", "vlm_config": config.vlm_config}
    for form in (config, tmp_path, live, {"model_type": "colqwen2", **table}):
        assert specs(form) == want


def test_a_wrapped_config_without_a_model_type_is_of_the_wrapper_s() -> None:
    table = {"model_type": "colqwen2", "vlm_config": {"image_token_id": 9}}
    assert specs(table) == specs({"model_type": "qwen2_vl", "image_token_id": 9})


@pytest.mark.parametrize("wrapper", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_a_whole_omni_is_read_without_what_its_thinker_has_by_default(wrapper: str) -> None:
    thinker = {"vision_start_token_id": 7}
    want = specs(live_config(f"{wrapper}_thinker"))
    want[0] = MRopeSpec.from_config({"model_type": f"{wrapper}_thinker", **thinker}, NEW)
    assert specs({"model_type": wrapper, "thinker_config": thinker}) == want
    towers = specs({"model_type": wrapper})
    assert towers[1:] == want[1:]
    assert "the config has no vision_start_token_id" in towers[0]


def test_the_wrappers_are_those_of_transformers() -> None:
    for name, (section, inner) in WRAPPERS.items():
        config = transformers.AutoConfig.for_model(name)
        assert getattr(config, section).model_type == inner


def test_no_reference_is_auto() -> None:
    for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        spec = MRopeSpec.from_config({"model_type": family}, reference=None)
        assert spec.reference == resolve_reference("auto")


def test_defaults_are_read_without_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from mrope import MRopeSpec\n"
        f"spec = MRopeSpec.from_config({str(tmp_path)!r}, {NEW!r})\n"
        "print(spec.image_token_id, spec.tokens_per_second)"
    )
    assert run_python(code).stdout.split() == ["151655", "4"]
