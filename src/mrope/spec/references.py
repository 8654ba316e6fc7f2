"""What each reference does, and which release of transformers is which.

A reference is a row of `REFERENCES`, named after the transformers release whose `get_rope_index` it
equals. Nothing else in the package asks for a version's number.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from mrope.errors import MRopeError


@dataclass(frozen=True)
class Reference:
    """What one era of transformers' `get_rope_index` does where the releases differ.

    Attributes:
        fill: position written at padding.
        delta_over_padded: `rope_deltas` is max + 1 - S with the padded S, instead of the row's own
            number of valid tokens.
        text_batch_fill_in_delta: in a batch without any grid the maximum is taken over the fill at
            padding too.
        advance_over_time: text goes on after the largest position of a span, time included, instead
            of after its larger spatial side.
        whole_seconds: `second_per_grid_ts` is truncated to an integer before it is multiplied.
        start_required: a span is found by the vision start marker in front of it; without one its
            placeholders are taken for text.
        binary_mask: only mask values of 1 are valid, so that a mask with other values has no
        meaning.
        timed_image_step: temporal step of an image in the families with timed videos.
    """

    fill: int
    delta_over_padded: bool
    text_batch_fill_in_delta: bool
    advance_over_time: bool
    whole_seconds: bool
    start_required: bool
    binary_mask: bool
    timed_image_step: int


REFERENCES: dict[str, Reference] = {
    "transformers-4.57": Reference(
        fill=1,
        delta_over_padded=True,
        text_batch_fill_in_delta=True,
        advance_over_time=True,
        whole_seconds=True,
        start_required=True,
        binary_mask=True,
        timed_image_step=0,
    ),
    "transformers-5.17": Reference(
        fill=0,
        delta_over_padded=False,
        text_batch_fill_in_delta=False,
        advance_over_time=False,
        whole_seconds=True,
        start_required=False,
        binary_mask=False,
        timed_image_step=1,
    ),
    "transformers-5.23": Reference(
        fill=0,
        delta_over_padded=False,
        text_batch_fill_in_delta=False,
        advance_over_time=False,
        whole_seconds=False,
        start_required=False,
        binary_mask=False,
        timed_image_step=1,
    ),
}

# First and last release (major, minor) of each era. 5.0 to 5.5 stand in no row: they number clips
# wrongly. The era of 5.23 begins with 5.18, the first wheel in which seconds are not truncated.
_ERAS: tuple[tuple[tuple[int, int], tuple[int, int], str], ...] = (
    ((4, 57), (4, 57), "transformers-4.57"),
    ((5, 6), (5, 17), "transformers-5.17"),
    ((5, 18), (5, 23), "transformers-5.23"),
)


def resolve_reference(name: str = "auto", installed: str | None = None) -> str:
    """Turn a reference's name, or "auto", into a key of `REFERENCES`.

    Args:
        name: a key of `REFERENCES`, or "auto": the era of the transformers that is installed, and
            "transformers-5.23" where none is. Its version is read from the package's metadata;
            transformers is not imported.
        installed: version to use for "auto" instead of the installed one.

    Raises:
        MRopeError: unknown name, or "auto" with a release that has no tested rule.

    Warns:
        UserWarning: "auto" with a release newer than any that was tested.

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
    if version is None:
        return _ERAS[-1][2]
    release = as_release(version)
    for first, last, reference in _ERAS:
        if first <= release <= last:
            return reference
    if release > _ERAS[-1][1]:
        warnings.warn(
            f"transformers {version} is newer than any release that mrope was tested against; "
            f"reference='auto' uses {_ERAS[-1][2]!r}",
            UserWarning,
            stacklevel=3,
        )
        return _ERAS[-1][2]
    why = "releases 5.0 to 5.5 number clips wrongly" if release[0] == 5 else "it was not tested"
    raise MRopeError(
        f"reference='auto' has no rule for transformers {version}: {why}; "
        f"install 4.57 or 5.6 and later, or name one of: {', '.join(REFERENCES)}"
    )


def installed_transformers() -> str | None:
    """Return the version of the installed transformers, from its metadata; None without it."""
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None


def as_release(version: str) -> tuple[int, int]:
    """Return major and minor number of a version of transformers.

    Raises:
        MRopeError: they cannot be told.

    Example:
        >>> as_release("5.23.0.dev0")
        (5, 23)
    """
    parsed = re.match(r"(\d+)\.(\d+)", version)
    if parsed is None:
        raise MRopeError(f"cannot read transformers' version {version!r}; name a reference")
    return int(parsed[1]), int(parsed[2])


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint at the known name that is most like `name`; nothing where none is."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
