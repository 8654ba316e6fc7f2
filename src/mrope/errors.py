"""The errors that this package raises: one base class and its few children."""

from __future__ import annotations


class MRopeError(ValueError):
    """Bad input to `mrope`: the message says what is wrong, where, and what it usually means."""


class SpanMismatchError(MRopeError):
    """Placeholder tokens and grids do not fit together.

    A DataLoader worker hands an exception to the main process by its message alone, so the message
    holds every fact; the attributes are there for code that catches the error where it is raised.

    Attributes:
        row: row of the batch, or None where the batch does not tell which row it is.
        span: ordinal of the image or video, counted from 0 within its row for each modality.
        modality: "image" or "video".
        found: placeholder tokens found for the span.
        needed: tokens that the grid of the span needs; 0 where there is no grid.
        cause: what this usually means.
    """

    def __init__(
        self,
        message: str,
        *,
        row: int | None = None,
        span: int | None = None,
        modality: str | None = None,
        found: int | None = None,
        needed: int | None = None,
        cause: str | None = None,
    ) -> None:
        super().__init__(message)
        self.row = row
        self.span = span
        self.modality = modality
        self.found = found
        self.needed = needed
        self.cause = cause
