"""Collate batches and attach position ids; drop, record and read back bad examples."""

from mrope.collate.rejects_file import read_rejects
from mrope.collate.skip_bad import Indexed, RejectWarning, SkipBad

__all__ = ["Indexed", "RejectWarning", "SkipBad", "read_rejects"]
