"""Run the command line: `python -m mrope`, and so `torchrun -m mrope`."""

from mrope.cli import main

main()
