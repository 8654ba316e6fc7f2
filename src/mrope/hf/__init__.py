"""The only room that imports transformers: a model that reads, and the reference to equal."""

from mrope.hf.attach import attach, detach

__all__ = ["attach", "detach"]
