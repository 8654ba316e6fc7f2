"""After collating: cut batches for sequence parallelism, rename keys for other trainers."""
