"""The bundle of the tests; benchmarks build it too."""

from benchmarks.tiny_bundle import CLASSES, HEAD, LORA, SCALE, tiny_bundle, tiny_data

__all__ = ["CLASSES", "HEAD", "LORA", "SCALE", "tiny_bundle", "tiny_data"]
