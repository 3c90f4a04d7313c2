"""The same training task twice, for `benchmarks.footprint`: each script is run by the Python of its own environment."""
