"""Fake quantization in plain ONNX: a weight that trains, and what enters its layer, take the values of integers.

    weights       symmetric per output channel, s_j = max|W_j| / (2^(b-1) - 1): nothing is ever cut off
    activations   unsigned 8 bit, one range for each sample, which always holds zero: lo = min(x, 0), hi = max(x, 0)

The range of a sample is its own, so that no sample changes the result of another, and no range grows old while the weights
move. The backward pass is the straight-through identity (Bengio et al., arXiv 1308.3432): every node here hands its
gradient to the value that is quantized, and none to a scale. Adapters stay outside (methods/precision.md, section 4).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import onnx_ir as ir

from export.gradients import STRAIGHT_THROUGH
from export.graph import Builder, Operand, dims
from export.quantize.weights import WEIGHTED, levels, output_axis
from export.shapes import infer_shapes

ACTIVATION_BITS: Final = 8
_NO_RANGE: Final = 1e-30  # of a channel of zeros, whose codes are zero at any scale


def fake_quantize(model: ir.Model, weights: Collection[str], bits: int) -> int:
    """Quantize these inputs `p.<t>` wherever they are the weight of a layer, and what enters it; return how many are.

    In place; shapes must be inferred. A weight that several layers read is quantized once.
    """
    graph = model.graph
    b = Builder(graph)
    layers = [(node, *_weight_of(node)) for node in graph if node.op_type in WEIGHTED]
    quantized: dict[ir.Value, ir.Value] = {}
    entering: dict[ir.Value, ir.Value] = {}
    for node, source, transposed in layers:
        x = node.inputs[0]
        if x is None or source is None or str(source.name) not in weights or len(dims(source)) < 2:
            continue
        if source not in quantized:
            b.scope = f"quantize/{str(source.name).removeprefix('p.')}"
            users = list(source.uses())
            quantized[source] = _weight(b, source, output_axis(node, transposed=transposed), bits)
            for user, index in users:
                user.replace_input_with(index, quantized[source])
        if x not in entering:
            b.scope = f"quantize/{node.name}/x"
            entering[x] = _activation(b, x)
        node.replace_input_with(0, entering[x])
    graph.sort()
    infer_shapes(model)
    return len(quantized)


def _weight_of(node: ir.Node) -> tuple[ir.Value | None, bool]:
    """The input that a layer's weight is, and whether it is read transposed."""
    weight = node.inputs[1]
    maker = None if weight is None else weight.producer()
    if maker is not None and maker.op_type == "Transpose":
        return maker.inputs[0], True
    return weight, False


def _weight(b: Builder, weight: ir.Value, axis: int, bits: int) -> ir.Value:
    others = b.ints(*(i for i in range(len(dims(weight))) if i != axis))
    largest = b.op("ReduceMax", b.op("Abs", weight), others, keepdims=1)
    scale = b.op("Max", b.op("Div", largest, float(levels(bits))), _NO_RANGE)
    codes = _through(b, "Round", _through(b, "Div", weight, scale))
    return _through(b, "Mul", codes, scale)


def _activation(b: Builder, x: ir.Value) -> ir.Value:
    most = float(2**ACTIVATION_BITS - 1)
    axes = b.ints(*range(1, len(dims(x))))
    low = b.op("Min", b.op("ReduceMin", x, axes, keepdims=1), 0.0)
    high = b.op("Max", b.op("ReduceMax", x, axes, keepdims=1), 0.0)
    scale = b.op("Max", b.op("Div", b.op("Sub", high, low), most), _NO_RANGE)
    zero_point = b.op("Round", b.op("Neg", b.op("Div", low, scale)))
    placed = _through(b, "Add", _through(b, "Round", _through(b, "Div", x, scale)), zero_point)
    codes = _through(b, "Clip", placed, 0.0, most)
    return _through(b, "Mul", _through(b, "Sub", codes, zero_point), scale)


def _through(b: Builder, op_type: str, *operands: Operand) -> ir.Value:
    """A node whose gradient goes to its first operand as it is."""
    value = b.op(op_type, *operands)
    producer = value.producer()
    assert producer is not None
    producer.metadata_props[STRAIGHT_THROUGH] = "1"
    return value
