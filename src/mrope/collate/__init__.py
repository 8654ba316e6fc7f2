"""Collate batches and attach position ids; drop, record and read back bad examples."""

from mrope.collate.digests import BatchDigest, DigestCollator
from mrope.collate.process_files import read_rejects
from mrope.collate.skip_bad import Indexed, RejectWarning, SkipBad

__all__ = [
    "BatchDigest",
    "DigestCollator",
    "Indexed",
    "RejectWarning",
    "SkipBad",
    "read_rejects",
]
