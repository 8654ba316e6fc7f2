"""Goldens: what releases that need an environment of their own computed, as one digest a batch.

A digest covers shape, dtype and every value of both outputs, so equal digests are bit-equal
outputs; `make parity` compares the arrays themselves.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mrope import MRopeSpec
from support.batches import random_batch
from support.specs import example_spec

BATCHES = 300
FOLDER = Path(__file__).parent / "data"


def golden_file(release: str) -> Path:
    """Return the file of a release, such as "5.24.0": one for each minor release."""
    return FOLDER / f"transformers-{'.'.join(release.split('.')[:2])}.json"


def golden_batches(family: str, reference: str) -> Iterator[tuple[MRopeSpec, dict[str, Any]]]:
    """Yield the seeded batches of one family and reference, the same on every machine."""
    spec = example_spec(family, reference)
    rng = random.Random(f"{family} {reference}")
    for _ in range(BATCHES):
        yield spec, random_batch(rng, spec)


def digest(values: Any) -> str:
    """Return 16 hex digits of arrays, with their names, dtypes and shapes, and of plain values."""
    state = hashlib.sha256()
    for name, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, np.ndarray):
            state.update(f"{name} {value.dtype} {value.shape} ".encode())
            state.update(np.ascontiguousarray(value).tobytes())
        else:
            state.update(f"{name} {value!r} ".encode())
    return state.hexdigest()[:16]
