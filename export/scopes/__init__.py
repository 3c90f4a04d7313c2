"""Which tensors of a model train, and how its graph is cut."""
