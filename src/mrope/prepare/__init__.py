"""Prepare a dataset before collating: check its rows, and batch them by a token budget.

Streams are batched by a token budget too, without knowing their lengths beforehand.

The collate function for Ray is in `mrope.prepare.ray`, which imports Ray.
"""

from mrope.prepare.precheck import Precheck, examples_of
from mrope.prepare.sampler import TokenBudgetSampler
from mrope.prepare.stop_together import stop_together
from mrope.prepare.streams import TokenBudgetStream
from mrope.prepare.work import WorkModel

__all__ = [
    "Precheck",
    "TokenBudgetSampler",
    "TokenBudgetStream",
    "WorkModel",
    "examples_of",
    "stop_together",
]
