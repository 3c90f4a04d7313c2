"""The ranges that activations take, seen by several clients: what static scales are computed from.

`RangeStats` keeps, for each client, count, minimum and maximum of each tensor: a monoid (`add`, `combine`, any order and
tree), a few hundred bytes a client. `finish` gives their union, exactly the minimum and maximum of the pooled data; a bound
beyond 4 times the median over at least three clients is cut to that, so that one of them cannot spoil everybody's
resolution. Histograms, where they are counted, add up over fixed edges.

`scale_of` is the rule of onnxruntime's quantizer for unsigned 8 bit: the range is widened to hold zero, and zero is a code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from edge_sdk.errors import EdgewiseError
from edge_sdk.tensors import Array

BINS: Final = 128
OUTLIER: Final = 4.0  # times the median over clients
DIM: Final = 0.5  # of the union's width: below it a client has seen too little
_ENOUGH: Final = 3  # clients, for a median that one of them does not decide


class RangeError(EdgewiseError):
    """Statistics that cannot be statistics of activations."""


@dataclass(frozen=True)
class Bounds:
    """Of one tensor at one client: how many values were seen, the least and the greatest of them (float32)."""

    count: int
    low: float
    high: float

    def joined(self, other: Bounds) -> Bounds:
        """Both together."""
        return Bounds(self.count + other.count, min(self.low, other.low), max(self.high, other.high))


@dataclass(frozen=True)
class RangeStats:
    """`clients`: client -> tensor -> bounds. `histograms`: tensor -> counts `[BINS]`, float64, over edges of the program."""

    clients: Mapping[str, Mapping[str, Bounds]] = field(default_factory=dict)
    histograms: Mapping[str, Array] = field(default_factory=dict)

    @classmethod
    def observed(cls, client: str, names: Sequence[str], low: Array, high: Array, count: int = 1) -> RangeStats:
        """From the accumulators of an `observe` program, `[n]` each, in the order of the bundle's `observed` names.

        Raises `RangeError` for other shapes or bounds that are not finite.
        """
        if low.shape != (len(names),) or high.shape != (len(names),):
            raise RangeError(
                f"client {client!r}: the bounds are {list(low.shape)} and {list(high.shape)}, expected [{len(names)}]"
            )
        held = zip(names, low.tolist(), high.tolist(), strict=True)
        return cls().combine(cls({client: {name: Bounds(count, *pair) for name, *pair in held}}))

    def add(self, client: str, name: str, values: Array) -> RangeStats:
        """With these values of a tensor. Raises `RangeError` if one is not finite."""
        if values.size == 0:
            return self
        return self.combine(RangeStats({client: {name: Bounds(values.size, float(values.min()), float(values.max()))}}))

    def combine(self, other: RangeStats) -> RangeStats:
        """Both together. Raises `RangeError` for bounds that are not finite or not in order."""
        clients = {client: dict(held) for client, held in self.clients.items()}
        for client, held in other.clients.items():
            mine = clients.setdefault(client, {})
            for name, bounds in held.items():
                if not (np.isfinite(bounds.low) and np.isfinite(bounds.high) and bounds.low <= bounds.high):
                    raise RangeError(
                        f"client {client!r}: tensor {name!r} has the range [{bounds.low}, {bounds.high}], "
                        "expected finite bounds in order: look at its samples"
                    )
                mine[name] = bounds.joined(mine[name]) if name in mine else bounds
        histograms = dict(self.histograms)
        for name, counts in other.histograms.items():
            histograms[name] = histograms[name] + counts if name in histograms else counts
        return RangeStats(clients, histograms)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors, sorted."""
        return tuple(sorted({name for held in self.clients.values() for name in held}))

    def finish(self, outlier: float = OUTLIER) -> dict[str, tuple[float, float]]:
        """Tensor -> (low, high) over all clients, bounds beyond `outlier` times their median cut to it."""
        return {name: self._range(name, outlier) for name in self.names}

    def _range(self, name: str, outlier: float) -> tuple[float, float]:
        held = [bounds[name] for bounds in self.clients.values() if name in bounds]
        lows, highs = np.array([b.low for b in held]), np.array([b.high for b in held])
        if len(held) >= _ENOUGH:
            for bounds in (lows, highs):
                limit = outlier * float(np.median(np.abs(bounds)))
                if limit > 0:
                    np.clip(bounds, -limit, limit, out=bounds)
        return float(lows.min()), float(highs.max())

    def dim_clients(self, share: float = DIM) -> dict[str, list[str]]:
        """Client -> tensors of which it has seen less than `share` of the width of the union: it was idle, or covered."""
        union = self.finish()
        found: dict[str, list[str]] = {}
        for client, held in sorted(self.clients.items()):
            narrow = [n for n, b in sorted(held.items()) if b.high - b.low < share * (union[n][1] - union[n][0])]
            if narrow:
                found[client] = narrow
        return found


def merged(parts: Iterable[RangeStats]) -> RangeStats:
    """All of them together."""
    total = RangeStats()
    for part in parts:
        total = total.combine(part)
    return total


def scale_of(low: float, high: float, most: int = 255) -> tuple[np.float32, int]:
    """Scale and zero point of codes 0..most for values from `low` to `high`."""
    low, high = float(np.float32(min(low, 0.0))), float(np.float32(max(high, 0.0)))
    scale = np.float32((high - low) / most)
    if not scale > np.finfo(np.float32).tiny:
        return np.float32(1), 0
    return scale, int(np.rint(-low / float(scale)))


def _entering(name: str, late: Mapping[str, Array]) -> str:
    """The activation that a bias names: what stands behind one of its `ENTERING`, the longest that has a scale."""
    parts = name.split(ENTERING)
    for start in range(1, len(parts)):
        tensor = ENTERING.join(parts[start:])
        if SCALE + tensor in late:
            return tensor
    raise RangeError(f"{name!r} belongs to no scale of the integer graph: export it again")


# Names in the tensor table of what a calibration changes in an integer graph; a bias says what enters its layer.
SCALE, ZERO_POINT, BIAS, BIAS_SCALE, ENTERING = "scale.", "zero_point.", "bias.", "bias_scale.", ".after."


def rescaled(late: Mapping[str, Array], ranges: Mapping[str, tuple[float, float]]) -> dict[str, Array]:
    """The late constants of an integer graph (table name -> value) for new ranges of its activations (tensor -> low, high).

    Biases are sums of products, so their scale is that of the activation times that of the weight: both they and their
    codes move with it. A tensor without a new range stays. Raises `RangeError` for a name that is none of these.
    """
    new = dict(late)
    factors: dict[str, float] = {}
    for name in late:
        if name.startswith(SCALE) and (tensor := name.removeprefix(SCALE)) in ranges:
            scale, zero_point = scale_of(*ranges[tensor])
            factors[tensor] = float(scale) / float(late[name])
            new[name] = np.array(scale, np.float32)
            new[ZERO_POINT + tensor] = np.array(zero_point, late[ZERO_POINT + tensor].dtype)
        elif not name.startswith((SCALE, ZERO_POINT, BIAS, BIAS_SCALE)):
            raise RangeError(f"{name!r} is no scale, zero point or bias of an integer graph")
    limit = 2**31 - 1
    for name in late:
        if not name.startswith((BIAS, BIAS_SCALE)):
            continue
        tensor = _entering(name, late)
        if tensor not in factors:
            continue
        if name.startswith(BIAS_SCALE):
            new[name] = (late[name] * np.float64(factors[tensor])).astype(np.float32)
        elif name.startswith(BIAS):
            new[name] = np.rint(late[name] / factors[tensor]).clip(-limit, limit).astype(np.int32)
    return new
