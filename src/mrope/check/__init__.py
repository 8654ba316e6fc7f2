"""Check every row of a dataset before training on it, explain single rows, and list host syncs.

`source` opens a dataset, `rows` and `row_layout` check one row in a worker, `summary` adds up the
results, `report` and `html_page` write them, `commands` combines these. `explain` prints the
position ids of one sample; `syncs` lists the host syncs of a training step.
"""
