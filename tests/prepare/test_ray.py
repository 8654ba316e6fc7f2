"""`RayCollator` without Ray: what it makes of a batch. `make ray` runs it on a real one."""

from __future__ import annotations

import importlib
import pickle
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from mrope import MRopeCollator
from support.rows import assert_same_batch
from support.samples import columns_of_samples, plain_samples
from support.specs import example_spec

SPEC = example_spec("qwen3_vl")


class NumpyBatchCollateFn:
    """What Ray's class of this name is to its subclasses: a base without arguments or behaviour."""

    def __init__(self) -> None:
        self.initialised = True


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Any:
    names = ("ray", "ray.data", "ray.data.collate_fn")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[-1]].NumpyBatchCollateFn = NumpyBatchCollateFn  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "mrope.prepare.ray", raising=False)
    yield importlib.import_module("mrope.prepare.ray").RayCollator
    sys.modules.pop("mrope.prepare.ray")


def as_ray_gives(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return columns as numpy arrays, those of different lengths as arrays of objects."""
    columns = {}
    for name, values in columns_of_samples(rows).items():
        column = np.empty(len(values), object)
        column[:] = [np.asarray(value) if isinstance(value, list) else value for value in values]
        columns[name] = column
    return columns


def test_columns_become_the_batch_of_their_rows(adapter: Any) -> None:
    rows = plain_samples(5)
    collate = MRopeCollator(None, SPEC)
    plain = [{name: value for name, value in row.items() if value is not None} for row in rows]
    made = adapter(collate)(as_ray_gives(rows))
    assert_same_batch(made, collate(plain))


def test_it_is_of_rays_class_and_pickles(adapter: Any) -> None:
    made = adapter(MRopeCollator(None, SPEC))
    assert isinstance(made, NumpyBatchCollateFn)
    assert made.initialised
    batch = pickle.loads(pickle.dumps(made))({"input_ids": np.array([[7, 8], [8, 9]])})
    assert torch.equal(batch["position_ids"], torch.arange(2).expand(3, 2, 2))
