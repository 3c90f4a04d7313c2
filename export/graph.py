"""Building blocks for passes over an ONNX graph: append nodes, ask for shapes and constants, write the file.

Graphs are `onnx_ir` graphs with one symbolic dimension, `batch`, opset 21 and IR version 10.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from edge_sdk.tensors import Array
from export.errors import UnknownShape, UnsupportedModel

OPSET: Final = 21
IR_VERSION: Final = 10
BATCH: Final = "batch"

Dims = tuple[int | str, ...]
Operand = ir.Value | Array | float | int | None


class Builder:
    """Appends nodes to a graph. Constants are stored once; what it makes is named `<scope>/<operator>_<n>`."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.scope = ""
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._taken = {value.name for value in _values(graph)}

    def op(self, op_type: str, *operands: Operand, name: str | None = None, **attributes: Any) -> ir.Value:
        """Append one node and return its first output. Arrays and numbers (as float32) become constants."""
        inputs = [self._operand(operand) for operand in operands]
        node = ir.Node("", op_type, inputs, ir.convenience.convert_attributes(attributes), num_outputs=1)
        node.outputs[0].name = name or self._name(op_type)
        node.name = f"{node.outputs[0].name}/node"
        self.graph.append(node)
        return node.outputs[0]

    def const(self, value: Array) -> ir.Value:
        """The constant of this content."""
        value = np.ascontiguousarray(value).reshape(np.shape(value))
        key = (value.dtype.name, value.shape, value.tobytes())
        if key not in self._constants:
            made = constant(self._name("const"), value)
            self.graph.register_initializer(made)
            self._constants[key] = made
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        """A one-dimensional int64 constant: axes, shapes, starts."""
        return self.const(np.array(values, np.int64))

    def input(self, name: str, dtype: str, dims: Dims) -> ir.Value:
        """A new input of the graph."""
        value = ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype))))
        self.graph.inputs.append(value)
        self._taken.add(name)
        return value

    def _operand(self, operand: Operand) -> ir.Value | None:
        if operand is None or isinstance(operand, ir.Value):
            return operand
        return self.const(operand if isinstance(operand, np.ndarray) else np.array(operand, np.float32))

    def _name(self, op_type: str) -> str:
        stem = f"{self.scope}/{op_type}" if self.scope else op_type
        number = 0
        while f"{stem}_{number}" in self._taken:
            number += 1
        self._taken.add(f"{stem}_{number}")
        return f"{stem}_{number}"


def constant(name: str, value: Array) -> ir.Value:
    """A value that holds this array, to be registered as an initializer."""
    made = ir.Value(name=name, shape=ir.Shape(value.shape), type=ir.TensorType(ir.DataType.from_numpy(value.dtype)))
    made.const_value = ir.tensor(value, name=name)
    return made


def dims(value: ir.Value) -> Dims:
    """The shape of a value, `batch` for the symbolic axis. Raises `UnknownShape`."""
    if value.shape is None:
        raise UnknownShape(
            f"the shape of {value.name!r} is unknown: export the model with static sizes except the batch"
        )
    return tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)


def static(value: ir.Value, first: int = 0) -> tuple[int, ...]:
    """The sizes of the axes from `first` on, all static. Raises `UnknownShape`."""
    sizes = dims(value)[first:]
    if not all(isinstance(size, int) for size in sizes):
        raise UnknownShape(f"{value.name!r} has the shape {list(dims(value))}; only the batch may vary")
    return tuple(int(size) for size in sizes)


def array_of(value: ir.Value | None) -> Array | None:
    """The content of a constant, None for anything else."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of an attribute, or the default."""
    held = node.attributes.get(name)
    return default if held is None else held.value


def tidy(model: ir.Model) -> None:
    """Drop what no output needs, merge equal constants and equal subexpressions (never inputs), sort."""
    wanted = list(model.graph.inputs)
    names = [str(value.name) for value in model.graph.outputs]
    ir.passes.Sequential(
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.DeduplicateInitializersPass(size_limit=1 << 40),
        passes.RemoveUnusedNodesPass(),
        passes.TopologicalSortPass(),
    )(model)
    assert list(model.graph.inputs) == wanted
    _name_outputs(model.graph, names)


def _name_outputs(graph: ir.Graph, names: Sequence[str]) -> None:
    """Give each output its own value and name again: two outputs of equal content were merged into one."""
    builder = Builder(graph)
    for index, (value, name) in enumerate(zip(list(graph.outputs), names, strict=True)):
        if value.name == name:
            continue
        if str(value.name) not in names and not value.is_graph_input() and value not in list(graph.outputs)[:index]:
            value.name = name
            continue
        copy = builder.op("Identity", value, name=name)
        copy.shape, copy.type = value.shape, value.type
        graph.outputs[index] = copy


def clone(model: ir.Model) -> ir.Model:
    """An independent copy, tensors shared."""
    return model.clone()


def adopt(model: ir.Model, origin: str) -> ir.Model:
    """Bring a forward graph into our form: one input `d.x`, one output, constants as initializers, one `batch` axis.

    Raises `UnsupportedModel` for what cannot be brought into it, naming `origin`.
    """
    graph = model.graph
    ir.passes.Sequential(
        passes.InlinePass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.RemoveInitializersFromInputsPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        passes.TopologicalSortPass(),
    )(model)
    _drop_dropout(graph)
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        raise UnsupportedModel(
            f"{origin}: has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs, expected one of each"
        )
    for node in graph:
        if node.domain not in ("", "ai.onnx"):
            raise UnsupportedModel(
                f"{origin}: node {node.name!r} is {node.domain}::{node.op_type}, no standard operator"
            )
        if any(held.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for held in node.attributes.values()):
            raise UnsupportedModel(f"{origin}: node {node.name!r} ({node.op_type}) holds a subgraph: control flow")
    graph.inputs[0].name = "d.x"
    _name_tensors(graph)
    _name_apart(graph)
    _name_batch(model, origin)
    return model


def _name_tensors(graph: ir.Graph) -> None:
    """Names that the tensor table can hold: letters, digits, underscores and dots."""
    for name, value in list(graph.initializers.items()):
        plain = re.sub(r"[^A-Za-z0-9_.]", "_", name)
        if plain.endswith(".next"):
            plain += "_"
        while plain != name and plain in graph.initializers:
            plain += "_"
        if plain != name:
            del graph.initializers[name]
            value.name = plain
            graph.register_initializer(value)


def _name_apart(graph: ir.Graph) -> None:
    """Give each result and each node a name of its own: a tensor of the model may be called like one of them."""
    taken = {value.name for value in graph.inputs} | set(graph.initializers)
    for number, node in enumerate(graph):
        node.name = node.name or f"{node.op_type}_{number}"
        for output in node.outputs:
            name, count = str(output.name), 0
            while name in taken:
                count += 1
                name = f"{output.name}~{count}"
            output.name = name
            taken.add(name)


def _name_batch(model: ir.Model, origin: str) -> None:
    graph = model.graph
    first = graph.inputs[0].shape
    if first is None or not len(first) or isinstance(first[0], int):
        raise UnsupportedModel(
            f"{origin}: the input has the shape {first}, expected a symbolic first axis for the batch: "
            "export the model with a dynamic batch axis"
        )
    symbol = str(first[0].value)
    for value in _values(graph):
        if value.shape is not None:
            sizes: list[int | str | None] = [s if isinstance(s, int) else s.value for s in value.shape]
            value.shape = ir.Shape([BATCH if s == symbol else s for s in sizes])
    if static_tail(graph.inputs[0]) is None:
        raise UnsupportedModel(
            f"{origin}: the input has the shape {list(dims(graph.inputs[0]))}; only the batch may vary"
        )
    if any(output.shape is None for node in graph for output in node.outputs):
        infer_shapes(model)


def static_tail(value: ir.Value) -> tuple[int, ...] | None:
    """The sizes behind the batch axis, None if one is not static."""
    sizes = dims(value)[1:]
    return None if any(isinstance(size, str) for size in sizes) else tuple(int(size) for size in sizes)


def infer_shapes(model: ir.Model) -> None:
    """Fill in the shapes of values that have none."""
    passes.ShapeInferencePass(check_type=True, strict_mode=False, data_prop=True)(model)


def _drop_dropout(graph: ir.Graph) -> None:
    for node in list(graph):
        if node.op_type == "Dropout":  # outside training it passes its input on
            source = node.inputs[0]
            assert source is not None
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
            graph.remove(node, safe=True)


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def trainable_constants(graph: ir.Graph) -> list[str]:
    """The constants that layers are made of: weights and biases of Conv, Gemm, MatMul and BatchNormalization, in order of use.

    Used where the model does not say itself which of its tensors are parameters, as an ONNX file does not.
    """
    slots = {"Conv": (1, 2), "Gemm": (1, 2), "MatMul": (1,), "BatchNormalization": (1, 2), "Add": (0, 1)}
    names: list[str] = []
    for node in graph:
        inputs = list(node.inputs)
        if node.op_type == "Add" and not any(
            value is not None and (maker := value.producer()) is not None and maker.op_type == "MatMul"
            for value in inputs
        ):
            continue  # only the bias behind a product
        for slot in slots.get(node.op_type, ()):
            value = inputs[slot] if slot < len(inputs) else None
            maker = None if value is None else value.producer()
            if maker is not None and maker.op_type == "Transpose":
                value = maker.inputs[0]
            array = array_of(value)
            if value is not None and array is not None and array.dtype == np.float32 and value.name not in names:
                names.append(str(value.name))
    return names
