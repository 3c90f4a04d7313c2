"""What a program costs, before anything runs: bytes that travel, bytes of state, floating-point operations."""

from __future__ import annotations

import math
from collections.abc import Iterable

import onnx_ir as ir

from export.graph import attribute, dims, given
from export.shapes import size_at


def flops_per_sample(model: ir.Model) -> float:
    """Floating-point operations of matrix products and convolutions for a batch of one; the rest is small beside them.

    Shapes must be inferred.
    """
    return float(sum(flops_of(node) for node in model.graph))


def flops_of(node: ir.Node) -> int:
    """Floating-point operations of one node for a batch of one."""
    if node.op_type in ("MatMul", "Gemm"):
        inner = 0 if attribute(node, "transA", 0) else -1
        return 2 * _elements(node.outputs[0]) * _sizes(given(node, 0))[inner]
    if node.op_type == "Conv":
        return 2 * _elements(node.outputs[0]) * math.prod(_sizes(given(node, 1))[1:])
    if node.op_type == "ConvTranspose":
        return 2 * _elements(given(node, 0)) * math.prod(_sizes(given(node, 1))[1:])
    return 0


def bytes_per_sample(values: Iterable[ir.Value]) -> int:
    """Bytes of these values for a batch of one."""
    return sum(_elements(value) * (4 if value.dtype is None else math.ceil(value.dtype.itemsize)) for value in values)


def _sizes(value: ir.Value) -> tuple[int, ...]:
    return tuple(size_at(size, 1) for size in dims(value))


def _elements(value: ir.Value) -> int:
    return math.prod(_sizes(value))


def peak_bytes(model: ir.Model, batch: int) -> int:
    """Bytes of the intermediate values that live at once, when the graph runs node by node; constants do not count.

    What the runtime needs beside that, such as the working memory of a convolution, is not known here.
    """
    nodes = list(model.graph)
    last = {value: index for index, node in enumerate(nodes) for value in node.inputs if value is not None}
    live, peak = 0, 0
    for index, node in enumerate(nodes):
        live += sum(_bytes(value, batch) for value in node.outputs if value in last)
        peak = max(peak, live)
        freed = {value for value in node.inputs if value is not None and value.producer() is not None}
        live -= sum(_bytes(value, batch) for value in freed if last[value] == index)
    return peak


def _bytes(value: ir.Value, batch: int) -> int:
    if value.shape is None:
        return 0
    width = 4 if value.dtype is None else math.ceil(value.dtype.itemsize)
    return width * math.prod(size_at(size, batch) for size in dims(value))
