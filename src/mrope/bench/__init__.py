"""Benchmarks: one module per question, run as `mrope bench NAME`; shared code in `harness`."""
