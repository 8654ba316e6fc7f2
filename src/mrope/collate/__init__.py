"""The collator, and what it does to a batch."""
