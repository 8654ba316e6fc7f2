"""`mrope check`: look at every row of a dataset before training on it.

`rows` and `layout` run in workers; `walk` sums up; `data` opens datasets, `report` and `page` say
what was found, and `run` is the command.
"""
