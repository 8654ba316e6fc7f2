"""Write the page of `mrope check --report`: counts, a histogram of lengths, drawings of bad rows.

The page is one file without scripts or external resources. All sizes are computed here; the
template only prints them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mrope import __version__
from mrope.check.report import (
    Check,
    count_rows,
    describe_verdict,
    list_counts,
    list_other_rows,
    strip_cause,
    write_text,
)
from mrope.check.row_layout import Misfit, RowLayout

# In SVG units, which the browser scales to the page's width.
_WIDTH, _BAR_HEIGHT, _HISTOGRAM_HEIGHT = 960.0, 30.0, 160.0
# Space above a row for the pointer's text, and between the row and the box of needed tokens.
_HEADROOM, _GAP = 24.0, 4.0
_MOST_BINS = 40
# Narrower boxes are invisible; a label is dropped if a box has less than _LETTER per character.
_THINNEST, _LETTER = 1.0, 9.0


@dataclass(frozen=True)
class Box:
    """A rectangle of a picture, in the picture's units.

    Attributes:
        x, y, width, height: position and size.
        kind: CSS class.
        label: text inside; may be empty.
        title: tooltip.
    """

    x: float
    y: float
    width: float
    height: float
    kind: str
    label: str
    title: str


@dataclass(frozen=True)
class Pointer:
    """Text above the part of a row that does not fit, and the line down to that part.

    Attributes:
        x: position of the line.
        text: the text.
        anchor: SVG `text-anchor`: which end of the text is at the line.
    """

    x: float
    text: str
    anchor: str


@dataclass(frozen=True)
class Picture:
    """Boxes within a width and a height, an optional pointer, and a caption."""

    width: float
    height: float
    boxes: list[Box]
    pointer: Pointer | None = None
    caption: str = ""


def write_page(check: Check, file: Path) -> None:
    """Write the page of a finished check.

    Raises:
        MRopeError: the file cannot be written.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mrope.check", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html").render(
        check=check,
        version=__version__,
        counts=list(list_counts(check)),
        verdict=describe_verdict(check.summary),
        histogram=draw_histogram(check.summary.lengths),
        draw=draw_row,
        count_rows=count_rows,
        list_other_rows=list_other_rows,
        strip_cause=strip_cause,
    )
    write_text(file, page)


def draw_histogram(lengths: Sequence[int]) -> Picture:
    """Draw a histogram of token counts; without lengths it has no bars."""
    boxes: list[Box] = []
    low, high = min(lengths, default=0), max(lengths, default=0)
    bins = min(_MOST_BINS, high - low + 1)
    # Integer borders and values shifted by 0.5: no length falls on a border between two bars.
    borders = np.unique(np.linspace(low, high + 1, bins + 1).astype(np.int64))
    counts = np.histogram(np.asarray(lengths) + 0.5, borders)[0].tolist()
    step = _WIDTH / len(counts)
    for number, count in enumerate(counts):
        if count:
            tall = max(_HISTOGRAM_HEIGHT * count / max(counts), _THINNEST)
            first, last = int(borders[number]), int(borders[number + 1]) - 1
            title = f"{first:,} to {last:,} tokens: {count_rows(count)}"
            top = _HISTOGRAM_HEIGHT - tall
            boxes.append(Box(number * step, top, step - 1, tall, "bar", "", title))
    caption = f"tallest bar: {count_rows(max(counts))}"
    return Picture(_WIDTH, _HISTOGRAM_HEIGHT, boxes, caption=caption)


def draw_row(layout: RowLayout) -> Picture:
    """Draw a row to scale; below a misfit, draw the tokens that its grid needs."""
    misfit = layout.misfit
    end = layout.tokens if misfit is None else misfit.start + (misfit.needed or 0)
    scale = _WIDTH / max(layout.tokens, end, 1)
    boxes = [
        _box(scale, run.kind, run.start, run.tokens, f"{run.kind}, {_span(run.start, run.tokens)}")
        for run in layout.runs
    ]
    height = _HEADROOM + _BAR_HEIGHT
    if misfit is None:
        return Picture(_WIDTH, height, boxes)
    if misfit.found:
        title = f"does not fit: {_span(misfit.start, misfit.found)}"
        boxes.append(_box(scale, "misfit", misfit.start, misfit.found, title))
    if misfit.needed:
        title = f"its grid needs {misfit.needed:,} tokens"
        top = height + _GAP
        boxes.append(_box(scale, "needed", misfit.start, misfit.needed, title, top))
        height = top + _BAR_HEIGHT
    return Picture(_WIDTH, height, boxes, _pointer(scale, misfit))


def _box(
    scale: float, kind: str, start: int, tokens: int, title: str, top: float = _HEADROOM
) -> Box:
    width = max(scale * tokens, _THINNEST)
    label = {"misfit": "", "needed": f"needs {tokens:,}"}.get(kind, f"{kind} {tokens:,}")
    if width < _LETTER * len(label):
        label = ""
    return Box(min(scale * start, _WIDTH - width), top, width, _BAR_HEIGHT, kind, label, title)


def _span(start: int, tokens: int) -> str:
    return f"token {start:,}" if tokens == 1 else f"tokens {start:,} to {start + tokens - 1:,}"


def _pointer(scale: float, misfit: Misfit) -> Pointer:
    # Above the middle of the tokens found, or of the missing ones if none were found.
    x = scale * (misfit.start + (misfit.found or misfit.needed or 0) / 2)
    anchor = "start" if x < _WIDTH / 3 else "end" if x > 2 * _WIDTH / 3 else "middle"
    found = _span(misfit.start, misfit.found) if misfit.found else f"nothing at {misfit.start:,}"
    if misfit.needed is None:
        return Pointer(x, found, anchor)
    needed = f"its grid needs {misfit.needed:,}" if misfit.needed else "no grid"
    return Pointer(x, f"{found}; {needed}", anchor)
