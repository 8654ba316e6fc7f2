"""Attach a transformers model to the batches of a collator, and call transformers' own rope index.

This wing calls transformers' modelling code; nothing that runs in a DataLoader worker imports it.
`mrope.training` and `mrope.bench` import transformers too, to build the models that they run and
to process the demo's rows. No other wing does, except through these three.
"""

from mrope.hf.attach import attach, detach, explain_attention

__all__ = ["attach", "detach", "explain_attention"]
