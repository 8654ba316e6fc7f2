"""A collator says once, where it can tell, that an unmodified model would decode wrongly."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mrope import MRopeCollator, MRopeSpec
from mrope.collate.decoding import _warn_once
from mrope.spec.spec import example_config


@pytest.fixture(autouse=True)
def transformers_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has loaded transformers' models, and not `mrope.hf`."""
    module = types.ModuleType("transformers.modeling_utils")
    monkeypatch.setitem(sys.modules, "transformers.modeling_utils", module)
    monkeypatch.delitem(sys.modules, "mrope.hf", raising=False)
    _warn_once.cache_clear()
    yield
    _warn_once.cache_clear()


def image_row(family: str, **columns: Any) -> dict[str, Any]:
    spec = MRopeSpec.from_config(example_config(family))
    ids = [7, spec.vision_start_token_id, *[spec.image_token_id] * 4, 8]
    return {"input_ids": ids, "image_grid_thw": torch.tensor([[1, 4, 4]]), **columns}


def warnings_of(caplog: pytest.LogCaptureFixture, family: str, *rows: Any) -> int:
    collate = MRopeCollator(None, MRopeSpec.from_config(example_config(family)))
    with caplog.at_level(logging.WARNING, "mrope"):
        for row in rows:
            collate([row])
    return caplog.text.count("`import mrope.hf` before the first batch")


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_it_is_said_once(caplog: pytest.LogCaptureFixture, family: str) -> None:
    assert warnings_of(caplog, family, image_row(family), image_row(family)) == 1


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "glm4v"])
def test_it_is_not_said_of_text_or_of_training(
    caplog: pytest.LogCaptureFixture, family: str
) -> None:
    row = image_row(family)
    trained = image_row(family, labels=row["input_ids"])
    assert warnings_of(caplog, family, {"input_ids": [7, 8, 9]}, trained) == 0


def test_it_is_not_said_where_models_keep_deltas_or_where_there_is_no_model(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mrope.hf", types.ModuleType("mrope.hf"))
        assert warnings_of(caplog, "qwen3_vl", image_row("qwen3_vl")) == 0
    monkeypatch.delitem(sys.modules, "transformers.modeling_utils")
    assert warnings_of(caplog, "qwen3_vl", image_row("qwen3_vl")) == 0
