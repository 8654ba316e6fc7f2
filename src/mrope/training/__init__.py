"""The training config: rows, batches and model as it says, under transformers' `Trainer`."""
