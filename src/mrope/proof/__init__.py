"""Compare mrope with the installed transformers, on small models and random batches.

Asked by `mrope doctor`, and, under a release of transformers that nobody has compared, by reading a
config, by `packing="flatten"` and by `attach`: see `mrope.spec.references.prove_if_unknown`.
"""

from mrope.proof.comparisons import Verdict, compare, prove

__all__ = ["Verdict", "compare", "prove"]
