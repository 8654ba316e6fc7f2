"""Attach a transformers model to the batches of a collator, and call transformers' own rope index.

Importing this wing lets every transformers model of the process keep the `rope_deltas` of a batch,
and generate from one, attached or not: see `keep_rope_deltas`.

This wing calls transformers' modelling code; nothing that runs in a DataLoader worker imports it.
`mrope.proof`, `mrope.training` and `mrope.bench` import transformers too, to build the models that
they run and to process the demo's rows, and so does `mrope.guard.sync_report`, a callback of its
trainer. No other wing does, except through these.
"""

from mrope.guard.sync_places import SyncPlace
from mrope.guard.sync_report import SyncReport
from mrope.hf.attaching import attach, compile_layers, detach, explain_attention
from mrope.hf.equip import equip
from mrope.hf.generation import for_generate
from mrope.hf.outputs import JoinedFeatures
from mrope.hf.rope_deltas import drop_rope_deltas, keep_rope_deltas

__all__ = [
    "JoinedFeatures",
    "SyncPlace",
    "SyncReport",
    "attach",
    "compile_layers",
    "detach",
    "drop_rope_deltas",
    "equip",
    "explain_attention",
    "for_generate",
    "keep_rope_deltas",
]

keep_rope_deltas()
