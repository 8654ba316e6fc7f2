"""Damage what stands behind prompts, and judge what `extend` makes of it.

It gives what `rope_index` gives for the concatenation, or raises an `MRopeError`; it accepts nothing that the
whole is refused for.
"""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import numpy as np

from fuzz.judge import EXACT, WrongError
from fuzz.mutations import EXAMPLE
from mrope import MRopeError, MRopeSpec, rope_index
from mrope.spec.families import FAMILIES
from mrope.transforms import extend
from support.batches import ROWS
from support.turns import Case, random_case

SILENT = ("glm_image", "qwen2_5_omni_talker", "qwen3_omni_moe_talker")
DECODING = [row for row in ROWS if row[0] not in SILENT]
assert set(SILENT) < set(FAMILIES)


def judge_responses(rng: random.Random, spec: MRopeSpec) -> tuple[str, str] | None:
    """Damage one turn, and return the kind of damage and the verdict; None: nothing to damage."""
    case = random_case(rng, spec)
    turns = [one for row in case.turns for one in row if isinstance(one, dict)]
    if not turns:
        return None
    turn, kind = rng.choice(turns), rng.choice(list(EXAMPLE))
    before = copy.deepcopy(turn)
    if EXAMPLE[kind](rng, spec, turn) is False or _same(before, turn):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return kind, _verdict(case)


def _same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return before.keys() == after.keys() and all(
        np.array_equal(np.asarray(before[name]), np.asarray(after[name])) for name in before
    )


def _verdict(case: Case) -> str:
    whole: Any
    try:
        whole = case.expected()
    except MRopeError as error:
        whole = error
    except (IndexError, TypeError, ValueError) as error:
        return f"the test cannot join it: {type(error).__name__}"
    try:
        extended = _extended(case)
    except MRopeError:
        return "refused"
    except Exception as error:
        raise WrongError(f"{type(error).__name__}: {error}, turns {case.turns}") from error
    if isinstance(whole, MRopeError):
        raise WrongError(f"accepted, but the whole is refused: {whole}, turns {case.turns}")
    for ours, theirs in zip(extended, whole, strict=True):
        if ours.dtype != theirs.dtype or not np.array_equal(ours, theirs):
            raise WrongError(f"not the whole's positions: turns {case.turns}")
    return EXACT


def _extended(case: Case) -> Any:
    ids, mask = case.ids_and_mask()
    sizes = case.prompt_sizes()
    positions, deltas = rope_index(case.spec, ids, mask, **sizes)
    given = {"attention_mask": mask}
    if case.spec.family_row.counts_images or positions.dtype == np.float32:
        given |= {"input_ids": ids, **sizes}
    return extend(case.spec, positions, deltas, case.turns, **given)
