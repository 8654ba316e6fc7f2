"""The only room that imports transformers."""
