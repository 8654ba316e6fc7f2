"""What a spec reads from a config, and which reference a release is."""

from __future__ import annotations

import ast
import dataclasses
import json
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from mrope import MRopeError, MRopeSpec
from mrope.spec import (
    FAMILIES,
    NO_TOKEN,
    REFERENCES,
    example_config,
    families,
    resolve_reference,
)
from support.specs import NEWEST as NEW
from support.specs import example_spec


@pytest.mark.parametrize(
    "family", [name for name, row in FAMILIES.items() if row.custom_index is None]
)
def test_the_spec_holds_what_the_config_says(family: str) -> None:
    config = example_config(family)
    row = FAMILIES[family]
    config["vision_config"][row.merge_keys[0]] = 3
    spec = MRopeSpec.from_config(config, NEW)
    assert (spec.family, spec.reference) == (family, NEW)
    ids = (spec.vision_start_token_id, spec.image_token_id, spec.video_token_id)
    keys = (row.start_keys, row.image_keys, row.video_keys)
    assert ids == tuple(101 + n if key else NO_TOKEN for n, key in enumerate(keys))
    assert spec.spatial_merge_size == 3
    assert spec.tokens_per_second == config["vision_config"].get("tokens_per_second")


def test_a_dict_a_file_a_folder_and_a_live_config_give_the_same_spec(tmp_path: Path) -> None:
    config = example_config("qwen2_5_vl")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    live = types.SimpleNamespace(to_dict=lambda: config)
    specs = {MRopeSpec.from_config(source, NEW) for source in (file, str(file), tmp_path, live)}
    assert specs == {MRopeSpec.from_config(config, NEW)}


# What the defaults of the others leave out, and checkpoints have: see the test below.
LIVE = [
    name
    for name, row in FAMILIES.items()
    if row.source is None
    and row.section
    and name not in ("aero_realtime", "hunyuan_vl", "minicpmv4_7")
]


@pytest.mark.parametrize("family", LIVE)
def test_a_live_config_of_transformers_is_read(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip("the installed release does not have it")
    # The Omni thinkers' defaults have no such token; their checkpoints have.
    config = transformers.AutoConfig.for_model(family, vision_start_token_id=7)
    spec = MRopeSpec.from_config(config, NEW)
    assert spec.image_token_id == config.image_token_id
    assert spec.spatial_merge_size == config.vision_config.spatial_merge_size
    config.save_pretrained(tmp_path)
    assert MRopeSpec.from_config(tmp_path, NEW) == spec


def test_live_configs_of_talkers_are_read() -> None:
    """Qwen3-Omni's class counts audio by a section that it does not declare, by 50 without."""
    transformers = pytest.importorskip("transformers")
    old = transformers.Qwen2_5OmniTalkerConfig()
    spec = MRopeSpec.from_config(old, NEW)
    assert (spec.image_token_id, spec.spatial_merge_size) == (old.image_token_id, 2)
    config = transformers.Qwen3OmniMoeTalkerConfig(spatial_merge_size=3)
    # The class has no `model_type`.
    table = {**config.to_dict(), "model_type": "qwen3_omni_moe_talker"}
    spec = MRopeSpec.from_config(table, NEW)
    assert (spec.image_token_id, spec.spatial_merge_size) == (config.image_token_id, 3)
    assert spec.extra["n_window"] == 50
    table["audio_config"] = {"n_window": 70}
    assert MRopeSpec.from_config(table, NEW).extra["n_window"] == 70


def test_aero_realtime_is_read_under_either_name_of_its_ids() -> None:
    config = example_config("aero_realtime")
    other = {key.replace("_index", "_id"): value for key, value in config.items()}
    assert set(other) != set(config)
    assert MRopeSpec.from_config(other, NEW) == MRopeSpec.from_config(config, NEW)
    assert MRopeSpec.from_config(config | other, NEW) == MRopeSpec.from_config(config, NEW)
    with pytest.raises(MRopeError, match="contradicts itself"):
        MRopeSpec.from_config(config | {"image_token_id": 7}, NEW)


def test_a_spec_pickles_and_cannot_be_changed() -> None:
    spec = example_spec("qwen2_vl")
    assert pickle.loads(pickle.dumps(spec)) == spec
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.family = "qwen3_vl"  # type: ignore[misc]


def changed(family: str = "qwen2_5_vl", **changes: Any) -> dict[str, Any]:
    """Return an example config with top-level keys changed, or left out where None."""
    config = example_config(family) | changes
    return {key: value for key, value in config.items() if value is not None}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            changed(model_type="qwen9_vl"),
            "unknown model_type 'qwen9_vl'.*known: qwen2_vl, qwen2_5_vl",
        ),
        (changed(model_type="qwen3_v"), r"did you mean 'qwen3_vl'\?"),
        (
            changed(model_type="qwen3_vl_text"),
            "is a part of a model; give the whole model's config",
        ),
        (changed(model_type=None), "has no model_type"),
        (
            changed("aero_realtime", image_token_index=None),
            "aero_realtime: the config has no image_token_index or image_token_id",
        ),
        (
            changed("qwen2_5_omni_thinker", vision_start_token_id=None),
            "qwen2_5_omni_thinker: the config has no vision_start_token_id",
        ),
        (changed(video_token_id="103"), "video_token_id must be an integer >= 0, not '103'"),
        (changed(video_token_id=-1), "video_token_id must be an integer >= 0, not -1"),
        (changed(video_token_id=True), "video_token_id must be an integer >= 0, not True"),
        (changed(video_token_id=102), "102 stands for two tokens, image and video"),
        (changed("aero_realtime", vision_config=None), "aero_realtime: the config has no vision_c"),
        (changed("aero_realtime", vision_config={}), "config has no spatial_merge_size"),
        (changed(vision_config={"spatial_merge_size": None}), "config has no spatial_merge_size"),
        (changed(vision_config={"tokens_per_second": None}), "config has no tokens_per_second"),
        (changed(vision_config="small"), "qwen2_5_vl: the config has no vision_config section"),
        (
            changed(vision_config={"spatial_merge_size": 0, "tokens_per_second": 2}),
            "spatial_merge_size must be an integer >= 1, not 0",
        ),
        (
            changed(vision_config={"spatial_merge_size": 2, "tokens_per_second": 1.5}),
            "tokens_per_second must be an integer >= 1, not 1.5",
        ),
        (17, "cannot read a model config from int"),
    ],
)
def test_a_config_that_is_wrong_says_where(config: Any, message: str) -> None:
    with pytest.raises(MRopeError, match=message):
        MRopeSpec.from_config(config, NEW)


def test_a_file_that_is_no_config_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        MRopeError, match="no model config at .*config.json; give model.config, .*nothing is downl"
    ):
        MRopeSpec.from_config(tmp_path, NEW)
    file = tmp_path / "config.json"
    file.write_text("[1]", encoding="utf-8")
    with pytest.raises(MRopeError, match="its top level is not an object"):
        MRopeSpec.from_config(file, NEW)
    file.write_text("{", encoding="utf-8")
    with pytest.raises(MRopeError, match="cannot read the model config"):
        MRopeSpec.from_config(file, NEW)
    with pytest.raises(MRopeError, match="cannot read the model config the JSON text: Expecting"):
        MRopeSpec.from_config("{'model_type': 'qwen2_vl'}", NEW)


@pytest.mark.parametrize(
    ("installed", "reference"),
    [
        ("4.57.0", "transformers-4.57"),
        ("4.57.6", "transformers-4.57"),
        ("5.6.0", "transformers-5.17"),
        ("5.17.3", "transformers-5.17"),
        ("5.18.0", "transformers-5.23"),
        ("5.23.0", "transformers-5.23"),
        ("5.24.0", "transformers-5.23"),
    ],
)
def test_auto_is_the_era_of_the_installed_release(installed: str, reference: str) -> None:
    assert resolve_reference("auto", installed=installed) == reference


def test_auto_is_the_newest_for_a_newer_release_and_is_compared_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only for "auto": a reference that is named was chosen. tests/proof/test_comparisons.py compares."""
    assert resolve_reference("auto", installed="6.0.1") == NEW
    compared: list[Any] = []
    proof = types.SimpleNamespace(prove=lambda *call: compared.append(call))
    monkeypatch.setitem(sys.modules, "mrope.proof", proof)
    monkeypatch.setattr("mrope.spec.references.installed_transformers", lambda: "6.0.1")
    spec = MRopeSpec.from_config(example_config("qwen3_vl"))
    assert compared == [("positions", spec)]
    MRopeSpec.from_config(example_config("qwen3_vl"), NEW)
    assert len(compared) == 1


@pytest.mark.parametrize(
    ("installed", "why"),
    [
        ("5.0.0", "releases 5.0 to 5.5 number clips wrongly"),
        ("5.5.4", "releases 5.0 to 5.5 number clips wrongly"),
        ("4.56.2", "it was not tested"),
        ("main", "cannot read transformers' version"),
    ],
)
def test_auto_refuses_releases_without_a_rule(installed: str, why: str) -> None:
    with pytest.raises(MRopeError, match=why):
        resolve_reference("auto", installed=installed)


def test_auto_is_the_newest_where_transformers_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mrope.spec.references.installed_transformers", lambda: None)
    assert resolve_reference("auto") == NEW
    assert MRopeSpec.from_config(example_config("qwen3_vl")).reference == NEW


def test_an_unknown_reference_lists_the_known() -> None:
    with pytest.raises(MRopeError, match="did you mean 'transformers-5.17'.*known: auto, "):
        resolve_reference("transformers-5.16")
    assert all(resolve_reference(name) == name for name in REFERENCES)


def test_rules_of_their_own_read_numbers_of_their_own() -> None:
    images = example_spec("glm_image")
    assert (images.video_token_id, images.extra) == (NO_TOKEN, {"image_end_token_id": 103})
    config = example_config("hunyuan_vl")
    assert MRopeSpec.from_config(config, NEW).extra == {"axes": 4}
    config["text_config"] = {"rope_scaling": {"xdrope_section": [8, 8, 8]}}
    assert MRopeSpec.from_config(config, NEW).extra == {"axes": 3}
    # A checkpoint older than `text_config`.
    flat = {key: value for key, value in config.items() if key != "text_config"}
    flat |= {"rope_scaling": {"xdrope_section": [8, 8, 8, 8]}}
    assert MRopeSpec.from_config(flat, NEW).extra == {"axes": 4}
    with pytest.raises(MRopeError, match="has no rope_parameters or rope_scaling section"):
        MRopeSpec.from_config(config | {"text_config": {}}, NEW)
    config = example_config("minicpmv4_7")
    sizes = [
        MRopeSpec.from_config(config | {"downsample_mode": mode}, NEW).spatial_merge_size
        for mode in ("4x", "16x")
    ]
    assert sizes == [2, 4]
    with pytest.raises(MRopeError, match="downsample_mode must be one of 4x, 16x, not 8x"):
        MRopeSpec.from_config(config | {"downsample_mode": "8x"}, NEW)


def test_an_omni_s_config_is_read_where_its_thinker_is() -> None:
    thinker = example_config("qwen2_5_omni_thinker")
    whole = {"model_type": "qwen2_5_omni", "thinker_config": thinker, "talker_config": {}}
    assert MRopeSpec.from_config(whole, NEW) == MRopeSpec.from_config(thinker, NEW)


def test_a_reference_that_a_family_was_not_compared_with_is_refused() -> None:
    with pytest.raises(MRopeError, match=r"glm4v was not compared with transformers-4.57; known: "):
        MRopeSpec.from_config(example_config("glm4v"), "transformers-4.57")


def test_a_row_of_the_table_is_short() -> None:
    """At most 12 lines each; what rows share stands above them."""
    source = Path(families.__file__).read_text(encoding="utf-8")
    table = next(
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "FAMILIES"
    )
    assert isinstance(table, ast.Dict) and len(table.values) == len(FAMILIES)
    lines = [row.end_lineno - row.lineno + 1 for row in table.values if row.end_lineno]
    assert max(lines) <= 12
