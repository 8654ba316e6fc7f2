"""Attach a transformers model to the batches of a collator, and call transformers' own rope index.

Importing this wing lets every transformers model of the process keep the `rope_deltas` of a batch,
attached or not: see `keep_rope_deltas`.

This wing calls transformers' modelling code; nothing that runs in a DataLoader worker imports it.
`mrope.training` and `mrope.bench` import transformers too, to build the models that they run and
to process the demo's rows. No other wing does, except through these three.
"""

from mrope.guard.sync_places import SyncPlace
from mrope.guard.sync_report import SyncReport
from mrope.hf.attaching import attach, detach, explain_attention
from mrope.hf.rope_deltas import drop_rope_deltas, keep_rope_deltas

__all__ = [
    "SyncPlace",
    "SyncReport",
    "attach",
    "detach",
    "drop_rope_deltas",
    "explain_attention",
    "keep_rope_deltas",
]

keep_rope_deltas()
