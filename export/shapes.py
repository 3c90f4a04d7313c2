"""Shapes that hold for every batch: the graph is inferred at two batch sizes, and what differs is the batch.

ONNX's shape inference gives up where a shape is computed from another one (`Shape`, `Slice`, `Concat`, `Reshape`), which
is how exporters write a reshape of a dynamic batch. With a number in place of the batch such shapes are constants. A size
is then an int if it is the same at both batch sizes, else a line through the two points: `batch`, `4*batch`, `batch+1`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes import common as passes

from edge_sdk.tensors import Array
from export.errors import UnknownShape

BATCH: Final = "batch"
_SIZES: Final = (101, 211)  # primes, so that a division of the batch is noticed
_LINE: Final = re.compile(r"((?P<slope>\d+)\*)?batch(?P<offset>[+-]\d+)?")
_SHAPE_KEEPING: Final = ("GroupNormalization", "MeanVarianceNormalization")
_SMALL: Final = 64  # elements: what shapes are computed with; weights are larger or are left alone


@dataclass(frozen=True)
class _Inferred:
    """What is known at one batch size: shape and element type of values, and the content of those computed from shapes."""

    shapes: dict[str, tuple[int | None, ...]]
    types: dict[str, int]
    computed: dict[str, Array]


def infer_shapes(model: ir.Model) -> None:
    """Set shape and type of every value that can be known; leave the others."""
    small, large = (_inferred(model, size) for size in _SIZES)
    for node in model.graph:
        for value in node.outputs:
            name = str(value.name)
            if name in small.types and value.type is None:
                value.type = ir.TensorType(ir.DataType(small.types[name]))
            if name in small.shapes and name in large.shapes:
                pairs = zip(small.shapes[name], large.shapes[name], strict=True)
                value.shape = ir.Shape([_size(*pair) for pair in pairs])


def fold_shapes(model: ir.Model) -> None:
    """Replace what is computed from shapes by constants: where only the batch is unknown, by a target with one -1."""
    small, large = (_inferred(model, size).computed for size in _SIZES)
    graph = model.graph
    for node in list(graph):
        for value in node.outputs:
            name = str(value.name)
            if name not in small or name not in large:
                continue
            first, second = small[name], large[name]
            if first.shape != second.shape or not value.uses():
                continue
            if (first == second).all():
                ir.convenience.replace_all_uses_with(value, _registered(graph, name, first), replace_graph_outputs=True)
            elif first.ndim == 1 and (first != second).sum() == 1 and -1 not in first:
                target = np.where(first == second, first, -1)
                for user, index in list(value.uses()):
                    if user.op_type == "Reshape" and index == 1:
                        user.replace_input_with(1, _registered(graph, f"{name}/target", target))
    passes.RemoveUnusedNodesPass()(model)


def size_at(size: int | str, batch: int) -> int:
    """A size that `infer_shapes` has set, at this batch size. Raises `UnknownShape` for a foreign symbol."""
    if isinstance(size, int):
        return size
    found = _LINE.fullmatch(size)
    if found is None:
        raise UnknownShape(f"the size {size!r} does not follow from the batch: export the model with static sizes")
    return int(found["slope"] or 1) * batch + int(found["offset"] or 0)


def _registered(graph: ir.Graph, stem: str, content: Array) -> ir.Value:
    name = f"{stem}/folded"
    if name not in graph.initializers:
        made = ir.Value(
            name=name, shape=ir.Shape(content.shape), type=ir.TensorType(ir.DataType.from_numpy(content.dtype))
        )
        made.const_value = ir.tensor(content, name=name)
        graph.register_initializer(made)
    return graph.initializers[name]


def _size(first: int | None, second: int | None) -> int | str | None:
    if first is None or second is None:
        return None
    if first == second:
        return first
    slope, rest = divmod(second - first, _SIZES[1] - _SIZES[0])
    offset = first - slope * _SIZES[0]
    if rest or slope < 1:
        return None
    return (f"{slope}*" if slope > 1 else "") + BATCH + (f"{offset:+d}" if offset else "")


def _inferred(model: ir.Model, batch: int) -> _Inferred:
    proto = _skeleton(model, batch)
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    computed: dict[str, Array] = {}
    while True:
        inferred = shape_inference.infer_shapes(proto, data_prop=True).graph
        shapes: dict[str, tuple[int | None, ...]] = {}
        types: dict[str, int] = {}
        for value in (*inferred.input, *inferred.value_info, *inferred.output):
            held = value.type.tensor_type
            types[value.name] = held.elem_type
            if held.HasField("shape"):
                shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in held.shape.dim)
        shapes |= {name: value.shape for name, value in known.items()}
        new = dict(_evaluated(proto.graph, shapes, known, computed))
        helped = _keep_shapes(proto.graph, shapes, types)
        if not new and not helped:
            shapes |= {name: value.shape for name, value in computed.items()}
            types |= {name: ir.DataType.from_numpy(value.dtype).value for name, value in computed.items()}
            return _Inferred(shapes, types, computed)
        kept = [node for node in proto.graph.node if node.output[0] not in new]
        for name, content in new.items():
            proto.graph.initializer.append(numpy_helper.from_array(content, name))
        del proto.graph.node[:]
        proto.graph.node.extend(kept)


def _keep_shapes(graph: onnx.GraphProto, shapes: dict[str, tuple[int | None, ...]], types: dict[str, int]) -> bool:
    """Note the shapes of outputs that ONNX's inference leaves open although they are those of the input."""
    helped = False
    for node in graph.node:
        name, source = node.output[0], node.input[0] if node.input else ""
        if node.op_type in _SHAPE_KEEPING and name not in shapes and None not in shapes.get(source, (None,)):
            graph.value_info.append(onnx.helper.make_tensor_value_info(name, types[source], shapes[source]))
            helped = True
    return helped


def _evaluated(
    graph: onnx.GraphProto,
    shapes: dict[str, tuple[int | None, ...]],
    known: dict[str, Array],
    computed: dict[str, Array],
) -> Iterator[tuple[str, Array]]:
    """What follows from the shapes known so far. Only integers enter, so that no weight is taken for a shape."""
    for node in graph.node:
        if not node.input or len(node.output) != 1:
            continue
        if node.op_type in ("Shape", "Size"):
            size = shapes.get(node.input[0])
            if size is None or None in size:
                continue
            ends = {held.name: held.i for held in node.attribute}
            content = np.array(size, np.int64)[ends.get("start") : ends.get("end")]
            result = content if node.op_type == "Shape" else np.array(int(np.prod(np.array(size, np.int64))))
        else:
            operands = [computed.get(name, known.get(name)) for name in node.input if name]
            if not any(name in computed for name in node.input) or any(
                v is None or v.size > _SMALL or (v.dtype.kind == "f" and name not in computed)
                for name, v in zip((n for n in node.input if n), operands, strict=True)
            ):
                continue
            target = computed.get(node.input[0])
            if node.op_type in ("ConstantOfShape", "Expand", "Range", "Tile") and (
                target is None or node.op_type != "ConstantOfShape" or np.prod(target) > _SMALL
            ):
                continue
            feeds = {name: computed.get(name, known.get(name)) for name in node.input if name}
            (found,) = ReferenceEvaluator(node).run(None, feeds)
            result = np.asarray(found)
            if result.size > _SMALL:
                continue
        computed[node.output[0]] = result
        yield node.output[0], result


def _skeleton(model: ir.Model, batch: int) -> onnx.ModelProto:
    """The graph with a number for the batch and without its large tensors, of which only shape and type matter here."""
    graph = onnx.GraphProto(name="shapes")
    for node in model.graph:
        graph.node.append(ir.serde.serialize_node(node))
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        held = value.const_value
        if held is not None and held.size <= _SMALL and not value.is_graph_input():
            graph.initializer.append(numpy_helper.from_array(held.numpy(), str(value.name)))
        else:
            made = ir.serde.serialize_value(value)
            for size in made.type.tensor_type.shape.dim:
                if size.dim_param == BATCH:
                    size.dim_value = batch
            graph.input.append(made)
    opsets = [onnx.OperatorSetIdProto(domain="", version=model.graph.opset_imports.get("", 21))]
    return onnx.ModelProto(graph=graph, ir_version=model.ir_version, opset_import=opsets)
