"""Attached models under the installed release: logits, loss and gradients as plain, and no sync.

`make releases` runs it under each minor release from 5.9 on.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

from mrope.guard import SyncGuard
from mrope.hf import attach
from mrope.hf.attaching import base_model
from mrope.hf.rows import ROWS
from mrope.proof import small_models
from mrope.spec.families import find_family


@pytest.fixture(params=ROWS)
def model(request: pytest.FixtureRequest) -> Any:
    try:
        return small_models.default_model(request.param)
    except (ImportError, LookupError, ValueError, AttributeError) as error:
        pytest.skip(f"the installed release does not have it: {error}"[:80])


def test_a_step_is_as_without(model: Any) -> None:
    equal, detail = small_models.compare_steps(model)
    assert equal, detail


def test_flattened_rows_are_as_padded_ones(model: Any) -> None:
    if not family_row(model).packs:
        pytest.skip("packing is refused for the family")
    equal, detail = small_models.compare_packing(model)
    assert equal, detail


def family_row(model: Any) -> Any:
    return find_family(base_model(model).config.model_type)


def test_a_step_does_not_sync(model: Any) -> None:
    batches = [batch for _, batch in small_models.staged_batches(model)]
    attach(model.train())
    for batch in batches:
        with SyncGuard() as guard:
            output = model(**batch, use_cache=False)  # as Trainer sets it
            (output[0].sum() if output.get("loss") is None else output.loss).backward()
        # Before 5.15 PaddleOCR-VL's tower takes no interpolation, and makes it image by image.
        left = [one for one in guard.sites if one.function != "interpolate_pos_encoding"]
        assert left == []
