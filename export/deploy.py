"""The quantized network of a bundle as programs that train nothing: it serves, scores itself, and watches its ranges.

`<name>/evaluate/int8` (or whatever ships, see `quantize.report`) has an `infer` graph in integers and counts its right
answers on held-out samples. `<name>/observe/float` runs the float graph that the integers were made from and accumulates
the least and the greatest value, and a histogram, of every tensor that has a scale; merged over devices
(`edge_sdk.ranges`) they give new scales. Both read plain ONNX graphs under the contract of step-graphs.md.

The scales, zero points and biases of the integer graph are tensors of the table (`c`, listed as the program's `late`): the
runtime is handed their values when it opens the graph, so new scales (`edge_sdk.ranges.rescaled`) need no new bundle, and
to the kernels they are constants all the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from edge_sdk.ranges import BIAS, BIAS_SCALE, BINS, ENTERING, SCALE, ZERO_POINT
from edge_sdk.tensors import Array
from export.graph import Builder, clone
from export.losses import Accumulator, Loss
from export.quantize.pipeline import Quantized
from export.quantize.ptq import IntegerModel, stripped
from export.shapes import infer_shapes
from export.step_graph import accumulating_graph, finished, loss_free, with_constants

LOW, HIGH, HISTOGRAM = "observe.low", "observe.high", "observe.histogram"
_WIDER: Final = 2.0  # times the range of the export: what devices see may be wider


@dataclass(frozen=True)
class Deployed:
    """Graphs by file name, rows of programs and of the tensor table, and what goes into the manifest's report."""

    graphs: Mapping[str, ir.Model]
    programs: tuple[Mapping[str, Any], ...]
    tensors: tuple[Mapping[str, Any], ...]
    late: Mapping[str, Array]
    report: Mapping[str, Any] = field(default_factory=dict)


def deployed(found: Quantized, loss: Loss, name: str, batch: int) -> Deployed:
    """The programs of a quantized network in a bundle called `name`."""
    precision = f"int{found.report.bits}" if found.report.ships == "integer" else "float"
    late = late_tensors(found) if found.report.ships == "integer" else {}
    served = _adopted(found, late)
    evaluate_id, observe_id = f"{name}/evaluate/{precision}", f"{name}/observe/float"
    given = {f"c.{name}": value for name, value in late.items()}
    infer = clone(served)
    infer.graph.outputs[0].name = "y.0"
    evaluate, counted = accumulating_graph(served, loss, evaluate_id)
    files = {
        f"{name}_deployed_infer.onnx": with_constants(finished(infer, evaluate_id), given),
        f"{name}_deployed_evaluate.onnx": with_constants(evaluate, given),
    }
    programs = [
        _row(evaluate_id, "evaluate", precision, counted, batch)
        | {
            "late": list(late),
            "infer": f"{name}_deployed_infer.onnx",
            "step": [{"file": f"{name}_deployed_evaluate.onnx", "weight": 1.0}],
            "samples": "held_out",
            "score": {"sum": loss.score.sum, "count": loss.score.count, "better": loss.score.better},
        }
    ]
    tensors = [_tensor(held, "sum") for held in counted]
    names: list[str] = []
    if _watched(found):  # weights in blocks multiply float activations: there is no scale to observe for
        observe, watched, names = observing_graph(found, observe_id)
        files[f"{name}_deployed_observe.onnx"] = observe
        programs.append(
            _row(observe_id, "observe", "float", watched, batch)
            | {"step": [{"file": f"{name}_deployed_observe.onnx", "weight": 1.0}], "partial_batch": "drop"}
        )
        tensors += [_tensor(held, "sum" if held.name == HISTOGRAM else "keep") for held in watched]
    report = {"quantization": found.report.to_json(), "observed": names}
    return Deployed(files, tuple(programs), tuple(tensors), late, report)


def _row(program_id: str, scope: str, precision: str, held: tuple[Accumulator, ...], batch: int) -> dict[str, Any]:
    size = sum(4 * int(np.prod(entry.shape)) for entry in held)
    return {
        "id": program_id,
        "scope": scope,
        "precision": precision,
        "stage": 0,
        "width": 1.0,
        "rank": 0,
        "factors": "",
        "tensors": [entry.name for entry in held],
        "constants": [],
        "infer": None,
        "prefix": [],
        "features": {"cacheable": False, "reason": "no frozen prefix", "bytes": 0, "dtype": "float32"},
        "batch": {"default": batch, "minimum": 1},
        "partial_batch": "mask",
        "hyper": {},
        "samples": "train",
        "state_bytes": size,
        "cost": {"bytes_up": size, "bytes_down": 0, "state_bytes": 2 * size},
    }


def _tensor(held: Accumulator, merge: str) -> dict[str, Any]:
    return {"name": held.name, "kind": "a", "dtype": "float32", "shape": list(held.shape), "merge": merge}


def late_row(name: str, value: Array, key: str) -> dict[str, Any]:
    """The row of a late constant in the tensor table; `key`: where the weight file holds its value."""
    shape = list(value.shape)
    return {"name": name, "kind": "c", "dtype": value.dtype.name, "shape": shape, "merge": "keep", "initial": key}


def late_tensors(found: Quantized) -> dict[str, Array]:
    """Table name -> value of every scale, zero point and bias of the integer graph (`edge_sdk.ranges.rescaled`)."""
    held = IntegerModel.read(found.graph).tensors()
    return {name: held[source] for source, name in _late_names(found).items()}


def _late_names(found: Quantized) -> dict[str, str]:
    """Initializer of the integer graph -> name in the tensor table."""
    quantizers = IntegerModel.read(found.graph)
    watched = _watched(found)
    names: dict[str, str] = {}
    for q in quantizers.activations:
        names |= {q.scale: SCALE + watched[q.name], q.zero_point: ZERO_POINT + watched[q.name]}
    of_scale = {q.scale: watched[q.name] for q in quantizers.activations}
    for q in quantizers.biases:
        assert q.inputs is not None
        stem = f"{_plain(q.name)}{ENTERING}{of_scale[q.inputs[0]]}"
        names |= {q.codes: BIAS + stem, q.scale: BIAS_SCALE + stem}
    return names


def _watched(found: Quantized) -> dict[str, str]:
    """Every activation that has a scale -> what it is called in the tensor table, no two alike."""
    names: dict[str, str] = {}
    for q in IntegerModel.read(found.graph).activations:
        name = _plain(q.name)
        while name in names.values():
            name += "_"
        names[q.name] = name
    return names


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]", "_", name)


def _adopted(found: Quantized, late: Mapping[str, Array]) -> ir.Model:
    """What ships, with its late constants as inputs for as long as passes run that would merge equal constants."""
    if found.report.ships == "float":
        content = found.model
    else:
        content = stripped(found.graph, {source: f"c.{name}" for source, name in _late_names(found).items()})
    model = ir.from_proto(onnx.load_from_string(content))
    graph = model.graph
    passes.RemoveInitializersFromInputsPass()(model)
    for name in late:
        value = graph.initializers[f"c.{name}"]
        del graph.initializers[f"c.{name}"]
        value.const_value = None
        graph.inputs.append(value)
    infer_shapes(model)
    return model


def observing_graph(found: Quantized, program_id: str) -> tuple[ir.Model, tuple[Accumulator, ...], list[str]]:
    """`a.observe.low/high [n]` and `a.observe.histogram [n, 128]` of the n tensors that have scales, whose names follow.

    The bins divide twice the range that the export has seen; what lies beyond counts in the outermost. The batch is never
    padded: there is no weight in a minimum.
    """
    model = clone(found.prepared)
    graph = model.graph
    watched = _watched(found)
    made = {str(value.name): value for value in (*graph.inputs, *(v for node in graph for v in node.outputs))}
    names = [name for name in watched if name in made]
    b = Builder(graph)
    b.scope = "observe"
    ranges = found.ranges.finish()
    lows, highs, counts = [], [], []
    for name in names:
        flat = b.op("Reshape", made[name], b.ints(-1))
        lows.append(b.op("ReduceMin", flat, b.ints(0), keepdims=1))
        highs.append(b.op("ReduceMax", flat, b.ints(0), keepdims=1))
        low, high = (_WIDER * min(ranges[name][0], 0.0), _WIDER * max(ranges[name][1], 0.0, 1e-6))
        place = b.op("Floor", b.op("Mul", b.op("Sub", flat, float(low)), float(BINS / (high - low))))
        index = b.op("Cast", b.op("Clip", place, 0.0, float(BINS - 1)), to=ir.DataType.INT64.value)
        ones = b.op("Add", b.op("Mul", flat, 0.0), 1.0)
        zeros = b.const(np.zeros(BINS, np.float32))
        counts.append(
            b.op("Unsqueeze", b.op("ScatterElements", zeros, index, ones, axis=0, reduction="add"), b.ints(0))
        )
    graph.outputs.clear()
    loss_free(b)
    held = (
        Accumulator(LOW, (len(names),), b.op("Concat", *lows, axis=0)),
        Accumulator(HIGH, (len(names),), b.op("Concat", *highs, axis=0)),
        Accumulator(HISTOGRAM, (len(names), BINS), b.op("Concat", *counts, axis=0)),
    )
    for entry, operator in zip(held, ("Min", "Max", "Add"), strict=True):
        state = b.input(f"a.{entry.name}", "float32", entry.shape)
        new = b.op(operator, state, entry.added, name=f"a.{entry.name}.next")
        new.shape, new.type = state.shape, state.type
        graph.outputs.append(new)
    return finished(model, program_id), held, [watched[name] for name in names]
