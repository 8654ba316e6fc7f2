"""Check every row of a dataset in worker processes, and sum up the results."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch.utils.data import DataLoader

from mrope.check.rows import CheckedRows, RowCheck

EXAMPLES = 5
"""Rows of each cause whose message and layout are kept; of further rows only the index is."""

INTERRUPTED = "interrupted"
"""Value of `Summary.stopped` after Ctrl-C."""

QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)

# Rows per message from a worker: few, because an interrupted check loses unfinished messages.
_TOGETHER = 16


@dataclass
class Findings:
    """Rows that share a cause.

    Attributes:
        rows: their indices, ascending.
        examples: results of the first `EXAMPLES` of them.
    """

    rows: array[int] = field(default_factory=lambda: array("q"))
    examples: list[RowCheck] = field(default_factory=list)

    def add(self, check: RowCheck) -> None:
        """Add the result of one row."""
        self.rows.append(check.row)
        if len(self.examples) < EXAMPLES:
            self.examples.append(check)


@dataclass
class Summary:
    """Results of a dataset; counts other than `of`, `rows` and `bad` cover good rows only.

    Attributes:
        of: rows of the dataset.
        rows: rows checked.
        bad: bad rows among these.
        tokens, images, videos, frames: sums over good rows.
        lengths, patches, segments: tokens, patches, and images and frames of each good row.
        largest: patches of the largest image or frame.
        longest: first good row with the most tokens; None without a good row.
        compared: good rows whose position ids equal those of the reference's own function.
        causes: bad rows by cause, in the order of their first row.
        unanswered: good rows for which the reference's own function raises, by type of exception.
        stopped: why the check ended early; None if it did not.
    """

    of: int
    rows: int = 0
    bad: int = 0
    tokens: int = 0
    images: int = 0
    videos: int = 0
    frames: int = 0
    lengths: array[int] = field(default_factory=lambda: array("q"))
    patches: array[int] = field(default_factory=lambda: array("q"))
    segments: array[int] = field(default_factory=lambda: array("q"))
    largest: int = 0
    longest: RowCheck | None = None
    compared: int = 0
    causes: dict[str, Findings] = field(default_factory=dict)
    unanswered: dict[str, Findings] = field(default_factory=dict)
    stopped: str | None = None

    def add(self, check: RowCheck) -> None:
        """Add the result of one row; rows have to come in ascending order."""
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
        self.patches.append(check.patches)
        self.segments.append(check.images + check.frames)
        self.largest = max(self.largest, check.largest)
        self.compared += check.compared
        if self.longest is None or check.tokens > self.longest.tokens:
            self.longest = check
        if check.unanswered is not None:
            self.unanswered.setdefault(check.unanswered, Findings()).add(check)

    def quantiles(self) -> dict[str, int]:
        """Compute the tokens per row at each of `QUANTILES`; empty without good rows."""
        if not self.lengths:
            return {}
        values = np.quantile(self.lengths, QUANTILES, method="inverted_cdf").tolist()
        names = ("min", *(f"p{100 * at:.0f}" for at in QUANTILES[1:-1]), "max")
        return dict(zip(names, map(int, values), strict=True))


def check_rows(
    rows: CheckedRows,
    workers: int = 0,
    start_method: str = "spawn",
    advance: Callable[[Summary], object] = lambda _: None,
) -> Summary:
    """Check every row, in order.

    Args:
        rows: the rows.
        workers: worker processes; 0: check in this process.
        start_method: multiprocessing start method of the workers.
        advance: called with the summary so far, after each message from a worker.

    Returns:
        The summary. After Ctrl-C or the death of a worker it covers the rows checked so far, and
        `stopped` states the reason.
    """
    summary = Summary(of=len(rows))
    loader = DataLoader(
        rows,
        batch_size=_TOGETHER,
        collate_fn=list,  # rows stay separate results
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
    except RuntimeError as error:  # checking a row never raises, so a worker died
        summary.stopped = str(error)
    return summary
