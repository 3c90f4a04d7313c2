"""Calibration on the workstation: every activation of a forward graph is watched while samples run through it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from edge_sdk.fields import INPUT
from edge_sdk.ranges import RangeStats
from edge_sdk.tensors import Array
from export.graph import clone
from export.quantize.kernels import quiet

LARGEST: int = 256  # samples: more of them gained nothing (methods/precision.md, section 8.2)
_BATCH = 32


def calibrate(model: ir.Model, x: Array, client: str = "workstation") -> RangeStats:
    """The ranges of all float activations for the first `LARGEST` samples of x `[n, *shape]`."""
    watched = clone(model)
    graph = watched.graph
    made = [value for node in graph for value in node.outputs if value.dtype == ir.DataType.FLOAT]
    graph.outputs.extend(value for value in made if not value.is_graph_output())
    proto = ir.to_proto(watched)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), quiet(), providers=["CPUExecutionProvider"])
    names = [str(value.name) for value in made]
    stats = RangeStats()
    for start in range(0, min(len(x), LARGEST), _BATCH):
        rows = np.ascontiguousarray(x[start : min(start + _BATCH, LARGEST)])
        stats = stats.add(client, INPUT, rows)
        for name, values in zip(names, session.run(names, {INPUT: rows}), strict=True):
            stats = stats.add(client, name, np.asarray(values))
    return stats


def parsed(model: ir.Model) -> onnx.ModelProto:
    """The file that onnxruntime's quantizer reads: no notes about shapes, which it would believe."""
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    return proto
