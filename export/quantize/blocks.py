"""4-bit weights of matrix products in blocks of 32, for transformers: the runtime multiplies them as they are.

    W[k, n] = s[k // 32, n] I[k, n],    I in -8..7, one scale for every 32 rows of a column

An int4 constant and one blocked DequantizeLinear in plain ONNX (opset 21); the runtime makes MatMulNBits of it and the
product. Activations stay in float32, so no calibration is needed. Convolutions and Gemm have no such kernel.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from edge_sdk.tensors import Array
from export.quantize.calibration import parsed

BLOCK: Final = 32
_MOST: Final = 7  # symmetric, as everywhere: -8 is not used


def to_blocks(model: ir.Model) -> onnx.ModelProto:
    """The forward graph with every constant right factor [k, n] of a MatMul in 4 bits, where 32 divides k."""
    made = parsed(model)
    graph = made.graph
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    done: set[str] = set()  # a weight may serve several products
    for node in list(graph.node):
        name = node.input[1] if node.op_type == "MatMul" else ""
        weight = held.get(name)
        if name in done:
            node.input[1] = f"{name}/float"
            continue
        if weight is None or weight.ndim != 2 or weight.shape[0] % BLOCK:
            continue
        codes, scales = blocked(weight)
        packed = helper.make_tensor(f"{name}/int4", TensorProto.INT4, codes.shape, codes.ravel().tolist())
        graph.initializer.extend([packed, numpy_helper.from_array(scales, f"{name}/scale")])
        spread = helper.make_node(
            "DequantizeLinear", [f"{name}/int4", f"{name}/scale"], [f"{name}/float"], axis=0, block_size=BLOCK
        )
        graph.node.insert(0, spread)
        node.input[1] = f"{name}/float"
        done.add(name)
    read = {name for node in graph.node for name in node.input}
    for tensor in list(graph.initializer):
        if tensor.name not in read:
            graph.initializer.remove(tensor)
    return made


def blocked(weight: Array) -> tuple[Array, Array]:
    """int8 codes in -7..7 of the shape [k, n], and float32 scales [k / 32, n]."""
    blocks = weight.reshape(-1, BLOCK, weight.shape[1])
    scales = (np.abs(blocks).max(axis=1) / _MOST).astype(np.float32)
    scales = np.where(scales > 0, scales, np.float32(1))
    codes = np.rint(blocks / scales[:, None]).clip(-_MOST, _MOST).astype(np.int8)
    return codes.reshape(weight.shape), scales
