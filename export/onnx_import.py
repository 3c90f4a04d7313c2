"""An ONNX file, also one that torch never saw, becomes a forward graph of our form."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import inliner, version_converter

from export.errors import UnsupportedModel
from export.forward import adopt
from export.graph import IR_VERSION, OPSET


def forward_graph(path: Path) -> ir.Model:
    """Read, inline functions, bring to opset 21. Raises `UnsupportedModel` naming the file."""
    try:
        proto = onnx.load(str(path))
        opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)
        if proto.functions:
            proto = inliner.inline_local_functions(proto, convert_version=True)
        if opset != OPSET:
            proto = version_converter.convert_version(proto, OPSET)
        proto.ir_version = IR_VERSION
        onnx.checker.check_model(proto)
    except OSError as error:
        raise UnsupportedModel(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # protobuf, the converter and the checker each have their own
        raise UnsupportedModel(
            f"{path}: not an ONNX model that opset {OPSET} can express: {str(error)[:300]}"
        ) from error
    return adopt(ir.from_proto(proto), str(path))
