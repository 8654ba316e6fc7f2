"""Errors that this package raises for bad input."""

from __future__ import annotations


class MRopeError(ValueError):
    """Bad input; the message states what is wrong, where, and the usual cause."""


def counted(number: int, noun: str) -> str:
    """Return a number and its noun, such as "1 video" and "2 videos"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def without_row_0(text: str) -> str:
    """Return the message of a batch of one row without its row, to be named by its place.

    Example:
        >>> without_row_0("row 0, image 1: found 3"), without_row_0("row 0: no labels")
        ('image 1: found 3', 'no labels')
    """
    for end in (", ", ": ", " "):
        if text.startswith(f"row 0{end}"):
            return text.removeprefix(f"row 0{end}")
    return text


class SpanMismatchError(MRopeError):
    """Placeholder tokens and grids do not match.

    DataLoader workers pass only an exception's message to the main process, so the message contains
    every attribute; the attributes serve code that catches the error where it is raised.

    Attributes:
        row: row of the batch; None if unknown.
        span: ordinal of the image or video, from 0 within its row for each modality.
        modality: "image" or "video".
        found: placeholder tokens found for the span.
        needed: tokens that the span's grid needs; 0 without a grid.
        cause: usual cause.
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
