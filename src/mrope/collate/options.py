"""Turn the short forms of `MRopeCollator` into its option objects."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from mrope.columns import Batch, NewColumns

Options = TypeVar("Options")


def resolve_option(
    name: str,
    kind: type[Options],
    value: object,
    short: str,
    off: str | None,
    fields: Batch,
) -> Options | None:
    """Return the option object that an argument stands for, or None where it is switched off.

    Args:
        name: of the argument.
        kind: dataclass of its options.
        value: an instance of `kind`; `short`, for its defaults and `fields`; or `off`.
        fields: keywords of the collator; those that belong to `kind` are taken out.

    Raises:
        ValueError: another value, or fields without the short form.
    """
    given = _take_fields(kind, fields)
    if value == short:
        return kind(**given)
    if given:
        raise ValueError(f"{', '.join(given)} belongs to {name}={short!r}")
    if value == off:
        return None
    if isinstance(value, kind):
        return value
    raise ValueError(
        f"{name} must be one of {off!r}, {short!r}, {kind.__name__}(...), not {value!r}"
    )


def _take_fields(kind: Any, fields: Batch) -> NewColumns:
    """Take out the fields of a dataclass whose values are not the defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    taken = {name: fields.pop(name) for name in defaults if name in fields}
    return {name: value for name, value in taken.items() if value != defaults[name]}
