"""The training config, and the reference loop that it drives."""
