"""Attached models are saved, copied and loaded as plain ones are."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForImageTextToText

from mrope.hf import attach, detach, explain_attention
from mrope.hf.rows import ROWS
from support.models import LIVE_FAMILIES, tiny_model
from support.steps import logits_of, make_batches

FAMILIES = [family for family in LIVE_FAMILIES if family in ROWS]


def saved_and_loaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


COPIES: dict[str, Callable[[Any], Any]] = {
    "torch.save": saved_and_loaded,
    "pickle": pickled,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_is_attached_and_runs_on_its_own_weights(family: str, how: str) -> None:
    plain_batch, batch = make_batches(family)
    model = attach(tiny_model(family))
    expected = logits_of(model, batch)
    twin = COPIES[how](model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits_of(twin, batch), expected)
    assert explain_attention(twin) == explain_attention(model)
    detach(twin)
    plain = tiny_model(family)
    assert torch.equal(logits_of(twin, plain_batch), logits_of(plain, plain_batch))
    assert not [module for module in twin.modules() if "forward" in vars(module)]
    attach(twin)
    assert torch.equal(logits_of(twin, batch), expected)


def test_a_model_sent_by_multiprocessing_is_attached() -> None:
    """Its pickler has a rule of its own for methods, and shares the weights."""
    _, batch = make_batches("qwen3_vl")
    model = attach(tiny_model("qwen3_vl"))
    twin = pickle.loads(ForkingPickler.dumps(model))
    assert explain_attention(twin) == explain_attention(model)
    assert torch.equal(logits_of(twin, batch), logits_of(model, batch))


def test_methods_of_others_pickle_as_before() -> None:
    for dumps in (pickle.dumps, ForkingPickler.dumps):
        assert pickle.loads(dumps(Path("a/b").with_suffix))(".c") == Path("a/b.c")
        assert pickle.loads(dumps(dict.fromkeys))([1]) == {1: None}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v"])
def test_weights_are_saved_under_the_same_names(family: str, tmp_path: Path) -> None:
    plain_batch, batch = make_batches(family)
    plain, model = tiny_model(family), attach(tiny_model(family))
    expected = logits_of(plain, plain_batch)
    assert model.state_dict().keys() == plain.state_dict().keys()
    other = attach(tiny_model(family, seed=1))
    other.load_state_dict(plain.state_dict())
    assert torch.equal(logits_of(other, batch), expected)

    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "attached")
    names = {file.name for file in (tmp_path / "plain").iterdir()}
    assert {file.name for file in (tmp_path / "attached").iterdir()} == names
    for name in names:
        ours, theirs = (tmp_path / one / name for one in ("attached", "plain"))
        assert ours.read_bytes() == theirs.read_bytes(), name
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "attached").eval()
    assert torch.equal(logits_of(loaded, plain_batch), expected)
    assert torch.equal(logits_of(attach(loaded), batch), expected)


def load_and_run(data: bytes, batch: dict[str, Any], answer: Any) -> None:
    logits = logits_of(pickle.loads(data), batch)
    answer.put(logits.tolist())


def test_a_new_process_loads_an_attached_model() -> None:
    """Nothing that `attach` registered with transformers is there: importing must do it."""
    _, batch = make_batches("qwen3_vl")
    model = attach(tiny_model("qwen3_vl"))
    spawn = multiprocessing.get_context("spawn")
    answer = spawn.Queue()
    run: Callable[..., None] = load_and_run
    process = spawn.Process(target=run, args=(pickle.dumps(model), batch, answer))
    process.start()
    logits = torch.tensor(answer.get(timeout=120))
    process.join()
    assert process.exitcode == 0
    assert torch.equal(logits, logits_of(model, batch))
