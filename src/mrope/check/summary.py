"""Every row of a dataset, in as many processes as are wanted, and the sum of what was found."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch.utils.data import DataLoader

from mrope.check.rows import CheckedRows, RowCheck

EXAMPLES = 5
"""Rows of each cause that are kept with their message and layout; of the others, the number."""

INTERRUPTED = "interrupted"
"""`Summary.stopped` after Ctrl-C."""

QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)

# Rows that travel together from a worker: few enough that an interrupted walk loses little.
_TOGETHER = 16


@dataclass
class Findings:
    """Rows with something in common.

    Attributes:
        rows: their numbers, ascending.
        examples: the first `EXAMPLES` of them.
    """

    rows: array[int] = field(default_factory=lambda: array("q"))
    examples: list[RowCheck] = field(default_factory=list)

    def add(self, check: RowCheck) -> None:
        """Take up one more row."""
        self.rows.append(check.row)
        if len(self.examples) < EXAMPLES:
            self.examples.append(check)


@dataclass
class Summary:
    """What was found in a dataset; counts other than `rows` and `bad` are of its good rows.

    Attributes:
        of: rows of the dataset.
        rows: how many were looked at.
        bad: how many of these are bad.
        tokens, images, videos, frames: sums over good rows.
        lengths: tokens of each good row.
        longest: the good row with the most tokens, the first of several; None without a good row.
        compared: good rows that the reference's own function numbered alike.
        causes: the bad rows by cause, in the order in which causes were met.
        unanswered: good rows that the reference's own function cannot number, by what it raised.
        stopped: why the walk ended early; None where it did not.
    """

    of: int
    rows: int = 0
    bad: int = 0
    tokens: int = 0
    images: int = 0
    videos: int = 0
    frames: int = 0
    lengths: array[int] = field(default_factory=lambda: array("q"))
    longest: RowCheck | None = None
    compared: int = 0
    causes: dict[str, Findings] = field(default_factory=dict)
    unanswered: dict[str, Findings] = field(default_factory=dict)
    stopped: str | None = None

    def add(self, check: RowCheck) -> None:
        """Take up one row; rows come in order."""
        self.rows += 1
        if check.cause is not None:
            self.bad += 1
            self.causes.setdefault(check.cause, Findings()).add(check)
            return
        self.tokens += check.tokens
        self.images += check.images
        self.videos += check.videos
        self.frames += check.frames
        self.lengths.append(check.tokens)
        self.compared += check.compared
        if self.longest is None or check.tokens > self.longest.tokens:
            self.longest = check
        if check.unanswered is not None:
            self.unanswered.setdefault(check.unanswered, Findings()).add(check)

    def quantiles(self) -> dict[str, int]:
        """Return tokens of the row at each of `QUANTILES`; of no row, nothing."""
        if not self.lengths:
            return {}
        values = np.quantile(self.lengths, QUANTILES, method="inverted_cdf").tolist()
        names = ("min", *(f"p{100 * at:.0f}" for at in QUANTILES[1:-1]), "max")
        return dict(zip(names, map(int, values), strict=True))


def walk(
    rows: CheckedRows,
    workers: int = 0,
    start_method: str = "spawn",
    advance: Callable[[Summary], object] = lambda _: None,
) -> Summary:
    """Look at every row, in order.

    Args:
        rows: the rows.
        workers: processes that look at them; 0: this one.
        start_method: how these are started.
        advance: called with what was found so far, each time there is more.

    Returns:
        What was found; what was found so far where Ctrl-C or the death of a worker ended the walk,
        with `stopped` saying so.
    """
    summary = Summary(of=len(rows))
    loader = DataLoader(
        rows,
        batch_size=_TOGETHER,
        collate_fn=list,
        num_workers=workers,
        multiprocessing_context=start_method if workers else None,
    )
    try:
        for checks in loader:
            for check in checks:
                summary.add(check)
            advance(summary)
    except KeyboardInterrupt:
        summary.stopped = INTERRUPTED
    except RuntimeError as error:  # rows raise nothing: a worker died
        summary.stopped = str(error)
    return summary
