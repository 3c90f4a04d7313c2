"""Random numbers from a seed, the same on every machine and with every version of numpy.

Each call hashes (seed, purpose, number of the call) with SHAKE-128 (FIPS 202, section 6.2): counter-based, so a draw can be
repeated without those before it. numpy's own generators would do, but their streams may change between versions (NEP 19),
and loading them costs a device 2.8 MB.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from edge_sdk.tensors import Array


class Draws:
    """A stream of draws for one purpose. Not thread-safe."""

    def __init__(self, seed: int, purpose: str) -> None:
        self._key = f"{seed}/{purpose}"
        self._calls = 0

    def uniform(self, shape: Sequence[int] = ()) -> Array:
        """float32 of this shape, uniform in [0, 1) with 24 bits."""
        bits = np.frombuffer(self._bytes(4 * math.prod(shape)), "<u4") >> 8
        return (bits.astype(np.float32) * np.float32(2**-24)).reshape(shape)

    def permutation(self, values: Array) -> Array:
        """The values `[n]` in random order, as a copy."""
        keys = np.frombuffer(self._bytes(8 * len(values)), "<u8")
        return np.asarray(values[np.argsort(keys, kind="stable")])

    def choice(self, weights: Sequence[float]) -> int:
        """An index, with probabilities in proportion to the weights."""
        point = float(self.uniform()) * math.fsum(weights)
        for index, weight in enumerate(weights):
            point -= weight
            if point < 0:
                return index
        return len(weights) - 1

    def _bytes(self, count: int) -> bytes:
        self._calls += 1
        return hashlib.shake_128(f"{self._key}/{self._calls}".encode()).digest(count)
