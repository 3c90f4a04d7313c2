"""The state of rules that need only weighted sums: `sum_k w_k X_k` and `sum_k w_k`, per tensor.

Speed: what limits a mean is reading every update once. Updates wait until eight are there; then a block of each, small
enough for the second-level cache, is gathered and reduced by one matrix-vector product in the tensors' own precision,
and the product is added to the float64 sum. Weights stay whole numbers until the end, so they are exact in float32 up
to 2^24; above that, and for float64 tensors, the block is float64. A float32 batch of eight errs by less than the final
rounding to float32 does (tests/aggregator/merge/test_sums.py). Memory: the float64 sum and eight updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from aggregator.merge import Contribution, MergeError, check_next
from edge_sdk.tensors import Array, Tensors

BATCH: Final = 8  # updates
BLOCK: Final = 16_384  # elements; a batch of float32 blocks is half a megabyte
_EXACT: Final = float(1 << 24)


class Sums:
    """Weighted sums of the tensors `names`; a contribution may lack some of them (another program trained others)."""

    def __init__(self, names: Sequence[str], *, uniform: bool = False) -> None:
        self.names = tuple(names)
        self.count = 0
        self._uniform = uniform
        self._sums: dict[str, npt.NDArray[np.float64]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._weights: dict[str, float] = {}
        self._waiting: list[tuple[float, Tensors]] = []
        self._keys: set[tuple[str, int]] = set()
        self._last: tuple[str, int] | None = None

    def add(self, contribution: Contribution) -> None:
        """Fold one more in; its arrays may be reused once eight more were added or the sums were read."""
        check_next(self._last, contribution)
        self._last = contribution.key
        self._keys.add(contribution.key)
        self.count += 1
        weight = (1.0 if self._uniform else float(contribution.num_examples)) * contribution.discount
        self._waiting.append((weight, contribution.tensors))
        if len(self._waiting) == BATCH:
            self._flush()

    def combine(self, other: Sums) -> Sums:
        """The sums of both, for instance of two gateways: exact up to the reassociation of float64 sums."""
        twice = self._keys & other._keys
        if twice:
            device, seq = min(twice)
            raise MergeError(f"update {seq} of device {device!r} would be counted twice")
        both = Sums(self.names, uniform=self._uniform)
        for part in (self, other):
            part._flush()
            for name, value in part._sums.items():
                both._sums[name] = both._sums[name] + value if name in both._sums else value.copy()
                both._weights[name] = both._weights.get(name, 0.0) + part._weights[name]
                both._shapes[name] = part._shapes[name]
        both.count = self.count + other.count
        both._keys = self._keys | other._keys
        both._last = max(both._keys, default=None)
        return both

    def mean(self, name: str, dtype: Any = np.float64) -> Array:
        """`sum w X / sum w` in the tensor's shape. Raises `MergeError` if no update holds the tensor."""
        self._flush()
        if name not in self._sums:
            raise MergeError(f"there is nothing to merge: no update holds tensor {name!r}")
        total = self._sums[name]
        mean = np.divide(total, self._weights[name], out=np.empty(len(total), dtype), casting="same_kind")
        return mean.reshape(self._shapes[name])

    def weight(self, name: str) -> float:
        """`sum w` over the updates that hold the tensor."""
        self._flush()
        return self._weights.get(name, 0.0)

    def close(self) -> None:
        """Let go of the arrays."""
        self._waiting.clear()
        self._sums.clear()

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        for name in self.names:
            held = [(weight, tensors[name]) for weight, tensors in waiting if name in tensors]
            if not held:
                continue
            shape = held[0][1].shape
            if name not in self._sums:
                self._sums[name] = np.zeros(int(np.prod(shape)), np.float64)
                self._shapes[name], self._weights[name] = shape, 0.0
            self._weights[name] += sum(weight for weight, _ in held)
            add_products(self._sums[name], [weight for weight, _ in held], [v.reshape(-1) for _, v in held])


def add_products(total: npt.NDArray[np.float64], weights: Sequence[float], rows: Sequence[Array]) -> None:
    """`total += sum_k weights_k rows_k` in place, flat arrays of one length, by blocks that stay in cache."""
    exact = all(weight == int(weight) and abs(weight) <= _EXACT for weight in weights)
    dtype: Any = np.float32 if exact and all(row.dtype == np.float32 for row in rows) else np.float64
    by = np.array(weights, dtype)
    block = np.empty(len(rows) * BLOCK, dtype)
    product = np.empty(BLOCK, dtype)
    for first in range(0, len(total), BLOCK):
        part = total[first : first + BLOCK]
        size = len(part)
        gathered = block[: len(rows) * size]
        np.concatenate([row[first : first + size] for row in rows], out=gathered)
        part += np.dot(by, gathered.reshape(len(rows), size), out=product[:size])
