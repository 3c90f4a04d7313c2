"""Weight-only integers: a frozen weight becomes int8 with one float32 scale per output channel, and one DequantizeLinear.

Symmetric, zero point 0, 2^(b-1) - 1 levels on each side (methods/precision.md, section 4). The dequantized value is read by the
forward and the backward pass alike, so both see the same weight. Trainable tensors and adapters are inputs of the graph
and are never touched. This saves flash and download; it saves neither time nor memory (step-graphs.md, section 5).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir

from edge_sdk.tensors import Array
from export.graph import array_of, attribute, constant

WEIGHTED: Final = ("Conv", "Gemm", "MatMul")


def quantize_weights(model: ir.Model, bits: int = 8) -> dict[str, Array]:
    """Quantize every constant weight of Conv, Gemm and MatMul in place; return what each one dequantizes to, by name.

    Codes of fewer than 8 bits are stored in int8 as well.
    """
    graph = model.graph
    dequantized: dict[str, Array] = {}
    for node in list(graph):
        weight = node.inputs[1] if node.op_type in WEIGHTED else None
        source = source_of(weight)
        value = array_of(source)
        if source is None or value is None or value.ndim < 2 or value.dtype != np.float32:
            continue
        maker = weight.producer() if weight is not None else None
        axis = output_axis(node, transposed=maker is not None and maker.op_type == "Transpose")
        codes, scales = quantize(value, axis, bits)
        name = str(source.name)
        shape = [-1 if i == axis else 1 for i in range(value.ndim)]
        dequantized[name] = codes.astype(np.float32) * scales.reshape(shape)
        inputs = [constant(f"{name}.int8", codes), constant(f"{name}.scale", scales)]
        for made in inputs:
            graph.register_initializer(made)
        step = ir.Node(
            "", "DequantizeLinear", inputs, [ir.AttrInt64("axis", axis)], num_outputs=1, name=f"{name}/dequantize"
        )
        step.outputs[0].name = f"{name}.dequantized"
        step.outputs[0].shape, step.outputs[0].type = source.shape, source.type
        graph.insert_before(next(iter(graph)), step)
        ir.convenience.replace_all_uses_with(source, step.outputs[0])
        del graph.initializers[name]
    return dequantized


def levels(bits: int) -> int:
    """How many steps of the scale lie on each side of zero."""
    return (1 << (bits - 1)) - 1


def quantize(value: Array, axis: int, bits: int = 8) -> tuple[Array, Array]:
    """int8 codes in the shape of `value`, and float32 scales `[value.shape[axis]]`."""
    most = levels(bits)
    others = tuple(i for i in range(value.ndim) if i != axis)
    scales = (np.abs(value).max(axis=others) / most).astype(np.float32)
    scales = np.where(scales > 0, scales, np.float32(1))
    shape = [-1 if i == axis else 1 for i in range(value.ndim)]
    return np.rint(value / scales.reshape(shape)).clip(-most, most).astype(np.int8), scales


def source_of(weight: ir.Value | None) -> ir.Value | None:
    """The constant behind a weight: through a transposition (torch's linear layers) or the sum with an adapter's product."""
    node = None if weight is None else weight.producer()
    if node is None:
        return weight
    transposes = node.op_type == "Transpose" and list(attribute(node, "perm", [])) == [1, 0]
    return node.inputs[0] if transposes or node.op_type == "Add" else None


def output_axis(node: ir.Node, *, transposed: bool) -> int:
    """The axis of the stored weight along which its node's output channels lie."""
    if node.op_type == "Conv" or transposed:
        return 0
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return 1
