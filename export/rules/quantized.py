"""Gradients through rounding: straight through, where the value was not saturated (Bengio et al., arXiv 1308.3432).

Of a frozen tensor they are never asked. Scales and zero points get no gradient.
"""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from export.gradients import Gradients, UnsupportedAttribute, Wanted, gradient
from export.graph import Builder, attribute, dims, given
from export.rules.elementwise import masked

_RANGES: Final = {
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT16: (-(2**15), 2**15 - 1),
    ir.DataType.UINT16: (0, 2**16 - 1),
}


@gradient("QuantizeLinear")
def _quantize(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """dy where round(x / s) + z lies within the codes: q_min - 1/2 <= x / s + z <= q_max + 1/2, as torch's fake quantization."""
    x, scale = given(node, 0), given(node, 1)
    if attribute(node, "block_size", 0):
        raise UnsupportedAttribute("block_size")
    codes = node.outputs[0].dtype
    if codes not in _RANGES:
        raise UnsupportedAttribute(f"codes of type {codes}")
    low, high = _RANGES[codes]
    if len(dims(scale)) == 1:
        column = [1] * len(dims(x))
        column[attribute(node, "axis", 1)] = -1
        scale = b.op("Reshape", scale, b.ints(*column))
    place = b.op("Div", x, scale)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        zero_point = b.op("Cast", node.inputs[2], to=ir.DataType.FLOAT.value)
        if len(dims(node.inputs[2])) == 1:
            zero_point = b.op("Reshape", zero_point, b.ints(*column))
        place = b.op("Add", place, zero_point)
    inside = b.op("And", b.op("GreaterOrEqual", place, low - 0.5), b.op("LessOrEqual", place, high + 0.5))
    return masked(b, inside, dy), None, None


@gradient("DequantizeLinear", "Round")
def _straight_through(_b: Builder, _node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """dy: of codes that QuantizeLinear made, and of a Round that is marked; any other Round has no gradient at all."""
    return dy, None, None
