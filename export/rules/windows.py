"""What convolutions and poolings have in common: windows that slide over the spatial axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from export.gradients import UnsupportedAttribute
from export.graph import attribute


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
