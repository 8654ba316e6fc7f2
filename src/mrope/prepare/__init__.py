"""Before collating: check a dataset, and deal its rows into batches."""
