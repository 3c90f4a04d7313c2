"""What convolutions and poolings have in common: windows that slide over the spatial axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from export.gradients import UnsupportedAttribute
from export.graph import Builder, attribute

# All values in a row. Not one axis: shape inference follows each element of such a value, as if it were a shape.
FLAT = (1, -1)


@dataclass(frozen=True)
class Window:
    """Kernel, strides, pads (all begins, then all ends) and dilations along the spatial axes."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]

    @property
    def rank(self) -> int:
        """The number of spatial axes."""
        return len(self.kernel)

    @property
    def reach(self) -> tuple[int, ...]:
        """From the first to the last place that a window sees."""
        return tuple(d * (k - 1) for d, k in zip(self.dilations, self.kernel, strict=True))

    @property
    def begins(self) -> tuple[int, ...]:
        """Padding before each axis."""
        return self.pads[: self.rank]

    @property
    def ends(self) -> tuple[int, ...]:
        """Padding behind each axis."""
        return self.pads[self.rank :]

    @property
    def turned(self) -> Window:
        """The same with its axes in reverse order."""
        pads = (*self.begins[::-1], *self.ends[::-1])
        return Window(self.kernel[::-1], self.strides[::-1], pads, self.dilations[::-1])

    def output_padding(self, sizes: Sequence[int], outs: Sequence[int]) -> list[int]:
        """What a ConvTranspose from `outs` places lacks to `sizes` places: those behind the last window."""
        return [
            size - (stride * (out - 1) + reach + 1 - begin - end)
            for size, out, stride, reach, begin, end in zip(
                sizes, outs, self.strides, self.reach, self.begins, self.ends, strict=True
            )
        ]


def window_of(node: ir.Node, kernel: Sequence[int]) -> Window:
    """The window of a node. Raises `UnsupportedAttribute` for automatic padding."""
    rank = len(kernel)
    if attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise UnsupportedAttribute(f"auto_pad = {attribute(node, 'auto_pad')}")
    return Window(
        tuple(kernel),
        tuple(attribute(node, "strides", [1] * rank)),
        tuple(attribute(node, "pads", [0] * 2 * rank)),
        tuple(attribute(node, "dilations", [1] * rank)),
    )


def apart(b: Builder, x: ir.Value, outs: Sequence[int], kernel: Sequence[int]) -> list[ir.Value]:
    """Windows side by side, taken apart: for each place of a window, in order, the values there, flat.

    The last axes of `x` hold `outs` windows of `kernel` places and nothing else. Axis after axis is split: the runtime
    copies rows far faster than it transposes.
    """
    below = math.prod(n * k for n, k in zip(outs, kernel, strict=True))
    parts = [x]
    for n, k in zip(outs, kernel, strict=True):
        below //= n * k
        if k > 1:
            rows = [b.op("Reshape", part, b.ints(-1, k, below)) for part in parts]
            parts = [piece for part in rows for piece in b.ops(k, "Split", part, axis=1, num_outputs=k)]
    return [b.op("Reshape", part, b.ints(*FLAT)) for part in parts]


def together(b: Builder, parts: Sequence[ir.Value], outs: Sequence[int], kernel: Sequence[int]) -> ir.Value:
    """The inverse of `apart`, flat."""
    below = 1
    for n, k in zip(reversed(outs), reversed(kernel), strict=True):
        if k > 1:
            rows = [b.op("Reshape", part, b.ints(-1, 1, below)) for part in parts]
            parts = [b.op("Concat", *rows[start : start + k], axis=1) for start in range(0, len(rows), k)]
        below *= n * k
    return parts[0]


def behind(b: Builder, flat: ir.Value, channels: int, used: Sequence[int], sizes: Sequence[int]) -> ir.Value:
    """`[batch, channels, *sizes]` from flat values of the places `used`, zeros behind them."""
    whole = b.op("Reshape", flat, b.ints(-1, channels, *used))
    if list(used) == list(sizes):
        return whole
    rest = [size - n for size, n in zip(sizes, used, strict=True)]
    return b.op("Pad", whole, b.ints(*[0] * (len(used) + 2), 0, 0, *rest))
