"""Compare mrope with the installed transformers: positions, attached models, flattened batches.

On a release that `mrope.spec.references` does not know, `prove` runs before a feature is used, and
`mrope doctor` runs all of it on any release. Models are small ones of the user's class, in float32
on the CPU, under sdpa or eager attention; flash attention and kernels of linear attention run on no
CPU, and are not compared.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mrope.errors import MRopeError
from mrope.hf.attaching import base_model
from mrope.hf.get_rope_index import has_rope_index, reference_rope_index
from mrope.positions.rope_index import rope_index
from mrope.proof.random_batches import random_arguments
from mrope.proof.small_models import (
    FAILURES,
    compare_packing,
    compare_steps,
    default_model,
    describe_error,
    small_copy,
)
from mrope.spec import references
from mrope.spec.spec import MRopeSpec

_BATCHES = 20
_WAY_OUT = {
    "positions": "or name a reference, which is then used without a comparison",
    "attach": "or attach(model, strict=False), which does not compare",
    "flatten": "or pad the batches",
}
_log = logging.getLogger("mrope")
# Features and subjects that were compared in this process, or are being compared: the small
# models are attached and their batches flattened, too, which asks for a proof again.
_proven: set[Any] = set()


@dataclass(frozen=True)
class Verdict:
    """Describe what a comparison found.

    Attributes:
        equal: None: nothing could be compared.
        detail: what was compared and, where not equal, the first difference; or why nothing was.
    """

    equal: bool | None
    detail: str


def prove(feature: str, subject: object) -> None:
    """Compare a feature with the installed transformers, once in a process.

    Args:
        feature: "positions", "attach" or "flatten".
        subject: an `MRopeSpec`, or for "attach" the model.

    Raises:
        MRopeError: a difference, or a model that could not be compared.

    Warns:
        UserWarning: the installed transformers has no function to compare positions with.
    """
    if _key(feature, subject) not in _proven:
        _judge(feature, compare(feature, subject))


def compare(feature: str, subject: object) -> Verdict:
    """Return what `prove` judges by, on any release; arguments as there."""
    key = None
    try:
        key = _key(feature, subject)
        _proven.add(key)
        verdict = _COMPARE[feature](subject)
    except FAILURES as error:
        # The unmodified model raised it, on a small config of ours.
        verdict = Verdict(None, f"not compared: {describe_error(error)}")
    if not verdict.equal:
        _proven.discard(key)
    return verdict


def _key(feature: str, subject: Any) -> Any:
    if feature != "attach":
        return feature, subject if feature == "positions" else subject.family
    base = base_model(subject)
    return feature, type(base), base.config.model_type


def _judge(feature: str, verdict: Verdict) -> None:
    release = f"transformers {references.installed_transformers()}"
    if verdict.equal:
        _log.info("%s is not in the tables of mrope; compared %s", release, verdict.detail)
        return
    known = f"the newest release known to work is {references.describe_known(feature)}"
    if verdict.equal is None and feature == "positions":
        warnings.warn(f"{release}: {verdict.detail}; {known}", UserWarning, stacklevel=6)
        return
    raise MRopeError(f"{release}: {verdict.detail}; {known}: install it, {_WAY_OUT[feature]}")


def compare_positions(spec: MRopeSpec) -> Verdict:
    """Compare `rope_index` with the family's own `get_rope_index` on twenty random batches."""
    if not has_rope_index(spec.family):
        return Verdict(None, f"not compared: it has no get_rope_index for {spec.family}")
    rng = np.random.default_rng(0)
    for number in range(_BATCHES):
        arguments = random_arguments(spec, rng)
        try:
            ours, theirs = rope_index(spec, **arguments), reference_rope_index(spec, arguments)
        except FAILURES as error:
            where = f"random batch {number} of {_BATCHES} of {spec.family}"
            return Verdict(False, f"{where} raised {describe_error(error)}")
        for name, one, other in zip(("position_ids", "rope_deltas"), ours, theirs, strict=True):
            if not np.array_equal(one, other):
                return Verdict(False, _first_difference(spec, number, name, one, other))
    return Verdict(True, f"positions of {spec.family} on {_BATCHES} random batches: equal")


def _first_difference(spec: MRopeSpec, number: int, name: str, ours: Any, theirs: Any) -> str:
    where = f"{name} of {spec.family} in random batch {number} of {_BATCHES}"
    if ours.shape != theirs.shape:
        return f"{where} have shape {ours.shape}, but {theirs.shape} in its get_rope_index"
    index = tuple(int(axis[0]) for axis in np.nonzero(ours != theirs))
    return f"{where} differ at {index}: {ours[index]}, but {theirs[index]} in its get_rope_index"


def compare_attached(model: Any) -> Verdict:
    """Compare a small model of the same class, attached, with itself unmodified."""
    return Verdict(*compare_steps(small_copy(model)))


def compare_flattened(spec: MRopeSpec) -> Verdict:
    """Compare flattened with padded batches, for a small model of the family's default config."""
    return Verdict(*compare_packing(default_model(spec.family)))


_COMPARE: dict[str, Callable[[Any], Verdict]] = {
    "positions": compare_positions,
    "attach": compare_attached,
    "flatten": compare_flattened,
}
