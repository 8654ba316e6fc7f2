"""The training config, and the reference training loop."""
