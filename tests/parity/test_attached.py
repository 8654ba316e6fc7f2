"""Attached models under the installed release: logits, loss and gradients as plain, and no sync.

`make releases` runs it under each minor release from 5.9 on.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from mrope.guard import Site, SyncGuard
from mrope.hf import attach
from mrope.hf.attaching import base_model
from mrope.hf.rows import ROWS
from mrope.proof import small_models
from mrope.proof.shrunken import build_model
from mrope.spec.families import find_family
from mrope.spec.references import installed_transformers, is_flattened
from support.flash import flash_attention


@pytest.fixture(params=ROWS)
def model(request: pytest.FixtureRequest) -> Any:
    try:
        return small_models.default_model(request.param)
    except (ImportError, LookupError, ValueError, AttributeError) as error:
        pytest.skip(f"the installed release does not have it: {error}"[:80])


def test_a_step_is_as_without(model: Any) -> None:
    equal, detail = small_models.compare_steps(model)
    assert equal, detail


def test_an_unmodified_model_takes_the_stage_too(model: Any) -> None:
    for plain, staged in small_models.staged_batches(model):
        theirs = small_models.take_step(model, plain)
        difference = small_models.describe_difference(small_models.take_step(model, staged), theirs)
        assert difference is None


def test_flattened_rows_are_as_padded_ones(model: Any) -> None:
    family, release = base_model(model).config.model_type, installed_transformers()
    if not family_row(model).packs or not is_flattened(family, str(release)):
        pytest.skip("packing is refused for the family")
    equal, detail = small_models.compare_packing(model)
    assert equal, detail


def test_under_flash_attention_patches_and_text_stay_apart(model: Any) -> None:
    """Flattened, attached: as padded under sdpa, and no sync but in the kernel's stand-in."""
    packs = family_row(model).packs and small_models.finds_borders(model)
    if not packs or not model._supports_flash_attn:
        pytest.skip("it is not packed, or runs under no flash attention")
    for flat, padded in small_models.flattened_batches(model):
        expected, _ = small_models.take_step(model, padded)
        with flash_attention():
            config = copy.deepcopy(model.config)
            other = build_model(type(model), config, "flash_attention_2")
            other.load_state_dict(model.state_dict())
            attach(other)
            with SyncGuard() as guard:
                output = other(**flat)
        logits, _ = output.logits[0, : len(expected["logits"])], output.loss.backward()
        torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-3)
        assert [
            one for one in syncs(guard, model) if not one.file.endswith("support/flash.py")
        ] == []


def syncs(guard: SyncGuard, model: Any) -> list[Site]:
    """Return the syncs, but those of PaddleOCR-VL's tower before 5.13, which takes no table taps."""
    module = sys.modules[type(model).__module__]
    own = any(hasattr(module, f"get_vision_{kind}_indices_and_weights") for kind in _TAPS)
    file = "none" if own else "modeling_paddleocr_vl.py"
    return [one for one in guard.sites if not one.file.endswith(file)]


_TAPS = ("bilinear", "interpolation")


def family_row(model: Any) -> Any:
    return find_family(base_model(model).config.model_type)


def test_a_step_does_not_sync(model: Any) -> None:
    batches = [batch for _, batch in small_models.staged_batches(model)]
    attach(model.train())
    for batch in batches:
        with SyncGuard() as guard:
            output = model(**batch, use_cache=False)  # as Trainer sets it
            (output[0].sum() if output.get("loss") is None else output.loss).backward()
        assert syncs(guard, model) == []
