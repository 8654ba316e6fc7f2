"""What the demo trains on: photographs that packages carry, and a tokenizer made from a text here.

An edge of the package: it needs the `train` extra. All of it runs in the main process.
"""
