"""The datasets for lmms-engine, over classes of its interface; `make peers` runs the real ones."""

from __future__ import annotations

import importlib
import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mrope import MRopeCollator, MRopeError, MRopeSpec
from mrope.collate.padding import PaddingCollator
from mrope.collate.skip_bad import SkipBad
from mrope.spec import example_config
from support.rows import assert_same_batch, row_of

NAME = "mrope.transforms.lmms_engine"
CONFIG = example_config("qwen3_vl")


class Photographs:
    """A dataset as lmms-engine has them: its constructor takes the YAML's section."""

    def __init__(self, config: Any) -> None:
        self.config, self.processor_config = config, config.processor_config

    def get_collator(self) -> Any:
        return PaddingCollator(padding_side="left")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return the module, imported beside a registry with one dataset."""
    for name in ("lmms_engine", "lmms_engine.datasets", "lmms_engine.mapping_func"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    mapping = {"photographs": Photographs}
    sys.modules["lmms_engine.mapping_func"].DATASET_MAPPING = mapping  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME)


def section(processor: Path | str = "nowhere", **options: Any) -> Any:
    named = SimpleNamespace(processor_name=str(processor))
    return SimpleNamespace(extra_kwargs={"mrope": options}, processor_config=named)


def test_each_dataset_is_registered_with_positions_once(engine: Any) -> None:
    mapping = engine.DATASET_MAPPING
    assert sorted(mapping) == ["mrope_photographs", "photographs"]
    assert engine.register_datasets() == []
    mapping["clips"] = type("Clips", (Photographs,), {})
    assert engine.register_datasets() == ["mrope_clips"]
    assert issubclass(mapping["mrope_photographs"], Photographs)


def test_its_collator_is_the_stage_around_the_datasets_own(engine: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    rows: Any = [row_of("qwen3_vl", ((4, 4),)), row_of("qwen3_vl", text=9)]
    wanted = MRopeCollator(
        PaddingCollator(padding_side="left"), MRopeSpec.from_config(CONFIG, "transformers-4.57")
    )(rows)
    kind = engine.DATASET_MAPPING["mrope_photographs"]
    for dataset in (kind(section(tmp_path)), kind(section(model=dict(CONFIG)))):
        assert_same_batch(pickle.loads(pickle.dumps(dataset)).get_collator()(rows), wanted)


def test_its_options_reach_the_stage(engine: Any) -> None:
    kind = engine.DATASET_MAPPING["mrope_photographs"]
    options: Any = {
        "on_error": "skip",
        "max_rejects": 3,
        "max_rejects_in_a_row": 7,
        "count_key": "bad",
    }
    collate = kind(section(model=dict(CONFIG), **options)).get_collator()
    assert collate.on_error == SkipBad(max_rejects=3, max_rejects_in_a_row=7, count_key="bad")


@pytest.mark.parametrize(
    "options, error, message",
    [
        (
            {"model": dict(CONFIG), "refrence": "x"},
            MRopeError,
            "unknown option 'refrence'.*reference",
        ),
        ({"model": dict(CONFIG), "max_rejects": 3}, ValueError, "max_rejects belongs to on_error"),
        ({"model": {"model_type": "nobody"}}, MRopeError, "nobody"),
    ],
)
def test_wrong_options_raise_before_data_is_loaded(
    engine: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        engine.DATASET_MAPPING["mrope_photographs"](section(**options))


def test_a_processor_without_a_config_asks_for_the_model(engine: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        MRopeError, match=r"no model config at .*dataset_config.extra_kwargs.mrope.model"
    ):
        engine.DATASET_MAPPING["mrope_photographs"](section(tmp_path))
    with pytest.raises(MRopeError, match="must be a mapping, not list"):
        engine.Options.read(["model"])
    assert engine.Options.read(None) == engine.Options()
