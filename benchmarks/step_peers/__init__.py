"""The processes that `benchmarks.step` times: one file per peer, each run by the Python of that peer's environment."""
