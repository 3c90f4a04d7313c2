"""Building blocks for passes over an ONNX graph: append nodes, ask for shapes and constants, write the file.

Graphs are `onnx_ir` graphs with one symbolic dimension, `batch`, opset 21 and IR version 10.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from edge_sdk.tensors import Array
from export.errors import UnknownShape

OPSET: Final = 21
IR_VERSION: Final = 10

Dims = tuple[int | str, ...]
Operand = ir.Value | Array | float | int | None


class Builder:
    """Appends nodes to a graph. Constants are stored once; what it makes is named `<scope>/<operator>_<n>`."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.scope = ""
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._taken = {value.name for value in values(graph)}
        self._numbers: dict[str, int] = {}

    def op(self, op_type: str, *operands: Operand, name: str | None = None, **attributes: Any) -> ir.Value:
        """Append one node and return its only output. Arrays and numbers (as float32) become constants."""
        (output,) = self.ops(1, op_type, *operands, **attributes)
        if name is not None:
            output.name = name
        return output

    def ops(self, count: int, op_type: str, *operands: Operand, **attributes: Any) -> tuple[ir.Value, ...]:
        """Append one node and return its first `count` outputs."""
        inputs = [self._operand(operand) for operand in operands]
        node = ir.Node("", op_type, inputs, ir.convenience.convert_attributes(attributes), num_outputs=count)
        for output in node.outputs:
            output.name = self._name(op_type)
        node.name = f"{node.outputs[0].name}/node"
        self.graph.append(node)
        return tuple(node.outputs)

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
        number = self._numbers.get(stem, 0)
        while f"{stem}_{number}" in self._taken:
            number += 1
        self._numbers[stem] = number + 1
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


def values(graph: ir.Graph) -> Iterable[ir.Value]:
    """Inputs, constants and results."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def reshaped(builder: Builder, value: ir.Value, like: ir.Value) -> ir.Value:
    """`value` in the shape of `like`, which has as many elements."""
    sizes = dims(like)
    if sum(isinstance(size, str) for size in sizes) > 1:
        return builder.op("Reshape", value, builder.op("Shape", like))
    return builder.op("Reshape", value, builder.ints(*(-1 if isinstance(size, str) else size for size in sizes)))


def expanded(builder: Builder, value: ir.Value, came: Dims, like: ir.Value) -> ir.Value:
    """`value` of shape `came` (same rank, 1 where it is to be repeated) in the shape of `like`."""
    sizes = dims(like)
    if came == sizes:
        return value
    if any(isinstance(size, str) and size != kept for size, kept in zip(sizes, came, strict=True)):
        return builder.op("Expand", value, builder.op("Shape", like))
    return builder.op("Expand", value, builder.ints(*(1 if isinstance(size, str) else size for size in sizes)))


def given(node: ir.Node, index: int) -> ir.Value:
    """The input at this place, which the operator requires."""
    value = node.inputs[index]
    assert value is not None, (node.op_type, index)
    return value
