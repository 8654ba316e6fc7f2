"""`mrope bench ...`: one file for each question, measured as ratios within one run."""
