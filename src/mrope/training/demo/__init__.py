"""The demo's data: photographs that packages ship, and a tokenizer trained on the text here.

Needs the `train` extra. All of it runs in the main process.
"""
