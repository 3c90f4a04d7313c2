"""What really runs in integers: the kernels of a graph as the runtime has optimised it, by counting (precision.md, 8.6).

An accuracy test cannot see a float fallback: a graph of QuantizeLinear and DequantizeLinear around a float convolution
gives the same numbers, and takes longer than the float network.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx
import onnxruntime

from edge_sdk.sessions import FLOAT_PRODUCTS, shared
from edge_sdk.tensors import Array

INTEGER: Final = frozenset(
    [
        "QLinearConv",
        "QLinearMatMul",
        "QGemm",
        "ConvInteger",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "QAttention",
        "MatMulNBits",
        "QLinearAdd",
    ]
)
_FLOAT: Final = frozenset(
    ["Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "TransposeMatMul", "Attention"]
)


@dataclass(frozen=True)
class Kernels:
    """Operators after optimisation: how many compute in integers; the float ones that could (name and operator)."""

    integer: int
    floats: tuple[str, ...]
    counts: dict[str, int]

    @property
    def all_integer(self) -> bool:
        """Whether no product and no residual sum is left in float, and one is in integers."""
        return self.integer > 0 and not self.floats


def kernels_of(model: bytes | Path, late: Mapping[str, Array] | None = None) -> Kernels:
    """Let the runtime optimise a model, or a file with its weights beside it, for this machine, and count.

    `late`: values for constants of a file, as in `edge_sdk.sessions.open_session`.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = quiet()
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        if late:
            options.add_external_initializers(list(late), [shared(value) for value in late.values()])
        source = str(model) if isinstance(model, Path) else model
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    counts: dict[str, int] = {}
    floats = []
    for node in graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
        residual = node.op_type == "Add" and not any(name in constants for name in node.input)
        if node.op_type in _FLOAT or residual:
            floats.append(f"{node.op_type} {node.name or node.output[0]}")
    integer = sum(count for name, count in counts.items() if name in INTEGER)
    return Kernels(integer, tuple(floats), dict(sorted(counts.items())))


def quiet() -> onnxruntime.SessionOptions:
    """One thread, and the settings of a device (`edge_sdk.sessions`)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = 1, 1, 4
    options.add_session_config_entry(*FLOAT_PRODUCTS)
    return options
