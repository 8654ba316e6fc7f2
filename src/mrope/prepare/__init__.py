"""Prepare a dataset before collating: check its rows, and batch them by a token budget.

The collate function for Ray is in `mrope.prepare.ray`, which imports Ray.
"""

from mrope.prepare.precheck import Precheck, examples_of
from mrope.prepare.sampler import TokenBudgetSampler

__all__ = ["Precheck", "TokenBudgetSampler", "examples_of"]
