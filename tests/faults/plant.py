"""The plant of the tests; `edgewise bench chaos` kills the same processes."""

from benchmarks.plant import BROKER, GATEWAY, Plant, chunked_site, waiting

__all__ = ["BROKER", "GATEWAY", "Plant", "chunked_site", "waiting"]
