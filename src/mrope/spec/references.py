"""Every table of transformers releases: what `get_rope_index` computes, and what was compared.

A reference is a row of `REFERENCES`, named after the release whose `get_rope_index` it equals, bit
for bit. No other module of the package compares a version with a constant of its own.

On a release outside the tables a feature is not refused: `prove_if_unknown` compares it with the
installed transformers first, once in a process.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace

from mrope.errors import MRopeError

Release = tuple[int, int]  # major, minor
Era = tuple[Release, Release]  # the first and the last one


@dataclass(frozen=True)
class Reference:
    """Conventions of one era of transformers' `get_rope_index`, where the eras differ.

    Source: `get_rope_index` of `qwen2_vl`, `qwen2_5_vl` and `qwen3_vl` in each release.

    Attributes:
        era: first and last release whose positions are these.
        fill: position written at padding.
        delta_over_padded: `rope_deltas` is max + 1 - S with the padded length S, instead of the
            row's number of valid tokens.
        text_batch_fill_in_delta: in a batch without any grid, that maximum includes the fill at
            padding.
        advance_over_time: text after a span starts behind the span's largest position, time
            included, instead of behind the larger of its height and width.
        whole_seconds: `second_per_grid_ts` is truncated to an integer before it is multiplied.
        start_required: a span needs a vision start marker in front; without one its placeholders
            get the positions of text.
        binary_mask: only tokens with a mask value of 1 are valid; other values are refused.
        talker_sums_mask: without images, clips and audio Qwen3-Omni's talker takes the running sum
            of the mask, as integers, in place of the thinker's rule.
        timed_image_step: temporal step between the frames of an image, in families with timed
            videos.
    """

    era: Era
    fill: int
    delta_over_padded: bool
    text_batch_fill_in_delta: bool
    advance_over_time: bool
    whole_seconds: bool
    start_required: bool
    binary_mask: bool
    talker_sums_mask: bool
    timed_image_step: int


# The era begins with 5.18, the first wheel that does not truncate seconds.
_NEWEST = Reference(
    era=((5, 18), (5, 24)),
    fill=0,
    delta_over_padded=False,
    text_batch_fill_in_delta=False,
    advance_over_time=False,
    whole_seconds=False,
    start_required=False,
    binary_mask=False,
    talker_sums_mask=True,
    timed_image_step=1,
)

# Oldest first. No row has 5.0 to 5.5, whose positions of clips are wrong.
REFERENCES: dict[str, Reference] = {
    "transformers-4.57": Reference(
        era=((4, 57), (4, 57)),
        fill=1,
        delta_over_padded=True,
        text_batch_fill_in_delta=True,
        advance_over_time=True,
        whole_seconds=True,
        start_required=True,
        binary_mask=True,
        talker_sums_mask=False,
        timed_image_step=0,
    ),
    "transformers-5.17": replace(
        _NEWEST, era=((5, 6), (5, 17)), whole_seconds=True, talker_sums_mask=False
    ),
    "transformers-5.23": _NEWEST,
}

# First release whose unmodified models keep the borders of the flattened row, `cu_seq_lens_q`, from
# flash attention in the vision tower.
_BORDERS_APART: Release = (5, 23)
# First release with which a family is flattened. Before it the linear layers of GLM-5-Next take the
# exponential of what lies above the diagonal, which overflows, and their gradients are NaN.
_FLATTENED_SINCE: dict[str, Release] = {"glm5_next": (5, 17)}
# Releases in which every family that has a feature was compared.
_COMPARED: dict[str, tuple[Era, ...]] = {
    "positions": tuple(reference.era for reference in REFERENCES.values()),
    "attach": (((5, 9), (5, 24)),),
    "flatten": (((5, 9), (5, 24)),),
}

TOWERS_READ_SINCE: Release = (5, 9)
"""First release whose towers take tensors of the stage.

Before 5.15 vision towers take some by other names or not at all, before 5.23 audio towers: an
attached model gives them those all the same, an unmodified one computes them again.
"""

# Releases whose tower interpolates its table from corner to corner, as no other of the family does.
_TO_CORNERS: dict[str, Era] = {"paddleocr_vl": ((5, 13), (5, 22))}


def prove_if_unknown(feature: str, subject: object) -> None:
    """Compare a feature with the installed transformers, unless that release is in the tables.

    Does nothing without an installed transformers, or in a DataLoader worker: the main process,
    which builds the spec, the collator and the model, compares.

    Args:
        feature: "positions", "attach" or "flatten".
        subject: what to compare: an `MRopeSpec`, or the model to attach.

    Raises:
        MRopeError: they differ, or cannot be compared.
    """
    version = installed_transformers()
    if version is None or is_known(feature, version) or _in_worker():
        return
    # Comparing needs transformers and every wing that is compared, and so stands above them all.
    from mrope.proof import prove

    prove(feature, subject)


def is_known(feature: str, version: str) -> bool:
    """Whether a feature was compared with a transformers release, in every family that has it.

    Example:
        >>> is_known("attach", "5.24.0"), is_known("attach", "5.8.1"), is_known("positions", "5.8")
        (True, False, True)
    """
    release = as_release(version)
    return any(first <= release <= last for first, last in _COMPARED[feature])


def describe_known(feature: str) -> str:
    """Return the newest release (major.minor) with which a feature was compared."""
    _, last = _COMPARED[feature][-1]
    return ".".join(map(str, last))


def interpolates_to_corners(family: str) -> bool:
    """Whether the installed release's tower of the family interpolates to corners."""
    version = installed_transformers()
    if version is None or family not in _TO_CORNERS:
        return False
    first, last = _TO_CORNERS[family]
    return first <= as_release(version) <= last


def is_flattened(family: str, version: str) -> bool:
    """Whether a family, if it is packed at all, is packed with this release.

    Example:
        >>> is_flattened("glm5_next", "5.16.1"), is_flattened("qwen3_vl", "5.16.1")
        (False, True)
    """
    return as_release(version) >= _FLATTENED_SINCE.get(family, (0, 0))


def borders_reach_the_tower(version: str) -> bool:
    """Whether this release passes the borders of flattened rows to the vision tower too.

    Under flash attention its patches would then attend within the text's borders. No comparison on
    a CPU finds that, so that these releases are refused.
    """
    return as_release(version) < _BORDERS_APART


def _in_worker() -> bool:
    # torch.utils.data is loaded in every worker; importing it here would load torch for nothing.
    data = sys.modules.get("torch.utils.data")
    return data is not None and data.get_worker_info() is not None


def resolve_reference(name: str = "auto", installed: str | None = None) -> str:
    """Turn a reference's name, or "auto", into a key of `REFERENCES`.

    Args:
        name: a key of `REFERENCES`, or "auto": the era of the installed transformers, or
            "transformers-5.23" if none is installed; the newest for a newer release. The version
            is read from the package's metadata; transformers is not imported.
        installed: version that "auto" uses instead of the installed one.

    Raises:
        MRopeError: an unknown name, or "auto" with a release before or between the eras.

    Example:
        >>> resolve_reference("auto", installed="5.12.0")
        'transformers-5.17'
    """
    if name != "auto":
        if name not in REFERENCES:
            raise MRopeError(
                f"unknown reference {name!r}{nearest(name, REFERENCES)}; "
                f"known: auto, {', '.join(REFERENCES)}"
            )
        return name
    version = installed if installed is not None else installed_transformers()
    *_, newest = REFERENCES
    if version is None:
        return newest
    release = as_release(version)
    for key, reference in REFERENCES.items():
        first, last = reference.era
        if first <= release <= last:
            return key
    if release > _NEWEST.era[1]:
        # Not a guess: `MRopeSpec.from_config` compares it with that release's own function.
        return newest
    # Only releases between or before the eras are left.
    why = "releases 5.0 to 5.5 number clips wrongly" if release[0] == 5 else "it was not tested"
    raise MRopeError(
        f"reference='auto' has no rule for transformers {version}: {why}; "
        f"install 4.57 or 5.6 and later, or name one of: {', '.join(REFERENCES)}"
    )


def installed_transformers() -> str | None:
    """Return the version of the installed transformers, from its metadata; None if absent."""
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None


def as_release(version: str) -> Release:
    """Parse the major and minor number of a transformers version.

    Raises:
        MRopeError: the version does not start with two numbers.

    Example:
        >>> as_release("5.23.0.dev0")
        (5, 23)
    """
    # Minor and patch suffixes such as "5.23.0.dev0" have no meaning here.
    parsed = re.match(r"(\d+)\.(\d+)", version)
    if parsed is None:
        raise MRopeError(f"cannot read transformers' version {version!r}; name a reference")
    return int(parsed[1]), int(parsed[2])


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a "did you mean" hint at the closest known name; empty if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
