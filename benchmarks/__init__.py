"""Benchmarks: `python -m benchmarks.NAME --json FILE`, each against the named peer in one run."""
