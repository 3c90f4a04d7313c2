"""Graphs as files that share one weight file (step-graphs.md, section 2.5).

Every tensor of 1 KiB or more lies once in `weights.safetensors`, whichever graphs read it; the graphs refer to it as ONNX
external data. Smaller ones stay inside the graph, as does int4, which a weight file cannot hold; a constant that the runtime may be handed
later (`c.<t>`) is always outside.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import onnx
import onnx_ir as ir

from edge_sdk.bundle import GRAPH_LIMIT, WEIGHTS
from edge_sdk.tensors import Array, pack
from export.errors import ContractError
from export.step_graph import constants

INLINE = 1024  # bytes
LATE = "c."  # the runtime may be handed another value for such a constant when it opens the graph


class WeightFile:
    """Collects tensors by content; `key` says under which name the file holds one."""

    def __init__(self) -> None:
        self._tensors: dict[str, Array] = {}
        self._keys: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def add(self, name: str, value: Array) -> str:
        """Hold this tensor, under `name` if that is free, and return its key."""
        identity = (value.dtype.name, value.shape, hashlib.sha256(value.tobytes()).digest())
        if identity not in self._keys:
            key, number = name, 1
            while key in self._tensors:
                number += 1
                key = f"{name}~{number}"
            self._tensors[key] = value
            self._keys[identity] = key
        return self._keys[identity]

    def to_bytes(self) -> bytes:
        """The file."""
        return pack(self._tensors)


def write_graphs(models: Sequence[ir.Model], weights: WeightFile) -> tuple[list[bytes], bytes]:
    """The graphs as ONNX files, and the weight file that they share. Equal graphs give equal bytes.

    Raises `ContractError` for a graph file above the limit (I13).
    """
    keys = [
        {
            name: weights.add(name, value)
            for name, value in sorted(constants(model).items())
            if (value.nbytes >= INLINE or name.startswith(LATE)) and value.dtype.kind in "biuf"
        }
        for model in models
    ]
    content = weights.to_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    files = []
    for model, held in zip(models, keys, strict=True):
        proto = ir.to_proto(model)
        del proto.graph.value_info[:]
        for tensor in proto.graph.initializer:
            if tensor.name in held:
                begin, end = header[held[tensor.name]]["data_offsets"]
                _point(tensor, 8 + length + begin, end - begin)
        data = proto.SerializeToString(deterministic=True)
        if len(data) > GRAPH_LIMIT:
            raise ContractError(f"{proto.graph.name}: I13: the graph takes {len(data)} bytes, at most {GRAPH_LIMIT}")
        files.append(data)
    return files, content


def _point(tensor: onnx.TensorProto, offset: int, length: int) -> None:
    """Take the data out of a tensor and say where it lies."""
    for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data"):
        tensor.ClearField(field)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", WEIGHTS), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
