"""Gradients of reductions, and of softmax, which is a quotient of two."""

from __future__ import annotations

import math

import onnx_ir as ir

from export.gradients import Gradients, UnsupportedAttribute, Wanted, gradient
from export.graph import Builder, Dims, array_of, attribute, dims, expanded, given


def _axes(node: ir.Node) -> list[int]:
    """The reduced axes, in order and not negative. Raises `UnsupportedAttribute` for axes that are computed."""
    rank = len(dims(given(node, 0)))
    held = node.inputs[1] if len(node.inputs) > 1 else None
    values = array_of(held)
    if held is not None and values is None:
        raise UnsupportedAttribute("axes that are computed")
    if values is None or values.size == 0:
        return [] if attribute(node, "noop_with_empty_axes", 0) else list(range(rank))
    return sorted(int(axis) % rank for axis in values)


def _kept(b: Builder, node: ir.Node, value: ir.Value, axes: list[int]) -> tuple[ir.Value, Dims]:
    """A value of the output's shape with the reduced axes put back as 1, and that shape."""
    sizes = dims(given(node, 0))
    if axes and not attribute(node, "keepdims", 1):
        value = b.op("Unsqueeze", value, b.ints(*axes))
    return value, tuple(1 if axis in axes else size for axis, size in enumerate(sizes))


@gradient("ReduceSum", "ReduceMean")
def _reduce(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """dy repeated along the reduced axes, divided by their count for the mean (counted in the graph where it is the batch)."""
    x, y = given(node, 0), node.outputs[0]
    axes = _axes(node)
    dy, came = _kept(b, node, dy, axes)
    if node.op_type == "ReduceMean":
        reduced = [dims(x)[axis] for axis in axes]
        if all(isinstance(size, int) for size in reduced):
            count: ir.Value | float = float(math.prod(int(size) for size in reduced))
        else:
            count = b.op("Div", *(b.op("Cast", b.op("Size", value), to=ir.DataType.FLOAT.value) for value in (x, y)))
        dy = b.op("Div", dy, count)
    return expanded(b, dy, came, x), None


@gradient("ReduceMax")
def _reduce_max(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """dy shared equally among the places that hold the maximum, as torch's amax."""
    x, axes = given(node, 0), _axes(node)
    y, _ = _kept(b, node, node.outputs[0], axes)
    dy, _ = _kept(b, node, dy, axes)
    mark = b.op("Cast", b.op("Equal", x, y), to=ir.DataType.FLOAT.value)
    ties = b.op("ReduceSum", mark, b.ints(*axes), keepdims=1)
    return b.op("Mul", mark, b.op("Div", dy, ties)), None


@gradient("ReduceL2")
def _reduce_l2(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """dy * x / y; 0 where the norm is 0, as in torch."""
    x, axes = given(node, 0), _axes(node)
    y, _ = _kept(b, node, node.outputs[0], axes)
    dy, _ = _kept(b, node, dy, axes)
    safe = b.op("Where", b.op("Equal", y, 0.0), 1.0, y)
    return b.op("Mul", x, b.op("Div", dy, safe)), None


@gradient("ReduceLogSumExp")
def _reduce_log_sum_exp(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """dy * exp(x - y)."""
    x, axes = given(node, 0), _axes(node)
    y, _ = _kept(b, node, node.outputs[0], axes)
    dy, _ = _kept(b, node, dy, axes)
    return b.op("Mul", dy, b.op("Exp", b.op("Sub", x, y))), None


@gradient("Softmax")
def _softmax(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """y * (dy - sum(dy * y)) along the axis."""
    y = node.outputs[0]
    weighted = b.op("Mul", dy, y)
    total = b.op("ReduceSum", weighted, b.ints(attribute(node, "axis", -1)), keepdims=1)
    return (b.op("Sub", weighted, b.op("Mul", y, total)),)


@gradient("LogSoftmax")
def _log_softmax(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """dy - exp(y) * sum(dy) along the axis."""
    total = b.op("ReduceSum", dy, b.ints(attribute(node, "axis", -1)), keepdims=1)
    return (b.op("Sub", dy, b.op("Mul", b.op("Exp", node.outputs[0]), total)),)
