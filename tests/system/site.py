"""The site of the tests; benchmarks run one too."""

from benchmarks.site import Running, Site, end, free_port, spawn, toml, until

__all__ = ["Running", "Site", "end", "free_port", "spawn", "toml", "until"]
