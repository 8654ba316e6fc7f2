"""Model families, releases of transformers, and the `MRopeSpec` read from a model's config."""
