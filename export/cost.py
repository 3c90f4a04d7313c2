"""What a program costs, before anything runs: bytes that travel, bytes of state, floating-point operations."""

from __future__ import annotations

import math

import onnx
import onnx_ir as ir
from onnx import shape_inference

from export.graph import BATCH


def flops_per_sample(model: ir.Model) -> float:
    """Floating-point operations of matrix products and convolutions for a batch of one; the rest is small beside them."""
    proto = ir.to_proto(model)
    for value in proto.graph.input:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == BATCH:
                size.dim_value = 1
    del proto.graph.value_info[:]
    for value in proto.graph.output:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.Clear()
    inferred = shape_inference.infer_shapes(proto, data_prop=True).graph
    shapes = {
        value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in [*inferred.input, *inferred.value_info, *inferred.output]
    }
    shapes.update({tensor.name: list(tensor.dims) for tensor in inferred.initializer})
    return float(sum(_flops(node, shapes) for node in inferred.node))


def _flops(node: onnx.NodeProto, shapes: dict[str, list[int]]) -> int:
    output, operands = shapes.get(node.output[0], []), [shapes.get(name, []) for name in node.input]
    if node.op_type in ("MatMul", "Gemm") and operands[0]:
        transposed = any(held.name == "transA" and held.i for held in node.attribute)
        return 2 * math.prod(output) * operands[0][0 if transposed else -1]
    if node.op_type == "Conv":
        return 2 * math.prod(output) * math.prod(operands[1][1:])
    if node.op_type == "ConvTranspose":
        return 2 * math.prod(operands[0]) * math.prod(operands[1][1:])
    return 0
