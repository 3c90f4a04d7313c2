"""Assembles the graphs of a program from a forward graph: `infer`, `step`, `gradients` and `evaluate`.

The contract of names, order, types and versions is step-graphs.md, section 2; `check_contract` is what the writer relies
on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edge_sdk.tensors import Array
from export.decompose import decompose
from export.errors import ContractError
from export.gradients import differentiate
from export.graph import IR_VERSION, OPSET, Builder, clone, dims, tidy
from export.losses import Accumulator, Loss
from export.optimizers import Optimizer, append_optimizer
from export.scopes import Trainable
from export.shapes import BATCH, infer_shapes

log = logging.getLogger(__name__)

NODES_LIMIT = 20_000  # I13
INPUTS_LIMIT = 4_096


@dataclass(frozen=True)
class Graphs:
    """The graphs of one program that trains, and of the one that evaluates it."""

    infer: ir.Model
    step: ir.Model
    evaluate: ir.Model
    accumulators: tuple[Accumulator, ...]


def build_graphs(
    forward: ir.Model, trainables: Sequence[Trainable], loss: Loss, optimizer: Optimizer, program_id: str
) -> Graphs:
    """All graphs of a program from `forward` (`d.x`, `p.*` in; one output). Raises `ExportError`."""
    names = [trainable.name for trainable in trainables]
    accumulators: list[Accumulator] = []

    def accumulate(b: Builder, output: ir.Value, target: ir.Value, weight: ir.Value) -> None:
        accumulators.extend(_accumulate(b, loss, output, target, weight))

    def step(b: Builder, output: ir.Value, target: ir.Value, weight: ir.Value) -> None:
        _, outputs = append_optimizer(b, optimizer, _differentiated(b, loss, output, target, weight, names))
        b.graph.outputs.extend(outputs)

    infer = clone(forward)
    infer.graph.outputs[0].name = "y.0"
    graphs = Graphs(
        infer=_finished(infer, program_id),
        step=_with_loss(forward, loss, step, program_id),
        evaluate=_with_loss(forward, loss, accumulate, program_id),
        accumulators=tuple(accumulators),
    )
    for model in (graphs.infer, graphs.step, graphs.evaluate):
        check_contract(model, program_id)
    return graphs


def gradients_graph(forward: ir.Model, trainables: Sequence[Trainable], loss: Loss, program_id: str) -> ir.Model:
    """Loss and `grad.<t>` of every trainable: what a proof looks at."""
    names = [trainable.name for trainable in trainables]

    def gradients(b: Builder, output: ir.Value, target: ir.Value, weight: ir.Value) -> None:
        for p, found in _differentiated(b, loss, output, target, weight, names).items():
            named = b.op("Identity", found, name=f"grad.{_table_name(p)}")
            named.shape, named.type = p.shape, p.type
            b.graph.outputs.append(named)

    return _with_loss(forward, loss, gradients, program_id)


def proof_constants(constants: Sequence[Trainable], seed: int) -> dict[str, Array]:
    """Values for the constants of a round in a proof, by graph name: none is zero, or it would hide a gradient."""
    draw = np.random.Generator(np.random.Philox(key=seed))
    return {c.graph_name: (c.value + draw.normal(0, 0.1, c.value.shape)).astype(np.float32) for c in constants}


def with_constants(forward: ir.Model, values: Mapping[str, Array]) -> ir.Model:
    """The graph with these inputs made constants."""
    model = clone(forward)
    for value in list(model.graph.inputs):
        if value.name in values:
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(values[str(value.name)], name=value.name)
            model.graph.register_initializer(value)
    return model


def loss_graph(forward: ir.Model, loss: Loss) -> ir.Model:
    """`d.x`, `d.y`, `d.w`, `p.*` in, `loss` out: what central differences are taken of."""
    model = clone(forward)
    b, output, target, weight = _data_inputs(model, loss)
    value = loss.build(b, output, target, weight)
    model.graph.outputs[:] = [_scalar(value)]
    return _finished(model, "loss")


def _with_loss(
    forward: ir.Model, loss: Loss, append: Callable[[Builder, ir.Value, ir.Value, ir.Value], None], program_id: str
) -> ir.Model:
    model = clone(forward)
    b, output, target, weight = _data_inputs(model, loss)
    model.graph.outputs.clear()
    append(b, output, target, weight)
    return _finished(model, program_id)


def _data_inputs(model: ir.Model, loss: Loss) -> tuple[Builder, ir.Value, ir.Value, ir.Value]:
    graph = model.graph
    b = Builder(graph)
    b.scope = "loss"
    output = graph.outputs[0]
    dtype, shape = loss.target(tuple(int(size) for size in dims(output)[1:]))
    return b, output, b.input("d.y", dtype, (BATCH, *shape)), b.input("d.w", "float32", (BATCH,))


def _scalar(value: ir.Value) -> ir.Value:
    value.shape, value.type = ir.Shape(()), ir.TensorType(ir.DataType.FLOAT)
    return value


def _differentiated(
    b: Builder, loss: Loss, output: ir.Value, target: ir.Value, weight: ir.Value, names: Sequence[str]
) -> dict[ir.Value, ir.Value]:
    value = _scalar(loss.build(b, output, target, weight))
    b.graph.outputs.append(value)
    by_name = {str(entry.name): entry for entry in b.graph.inputs}
    trained = [by_name[f"p.{name}"] for name in names]
    decompose(b, value, trained)
    return differentiate(b, value, trained)


def _accumulate(
    b: Builder, loss: Loss, output: ir.Value, target: ir.Value, weight: ir.Value
) -> tuple[Accumulator, ...]:
    b.scope = "evaluate"
    found = loss.evaluate(b, output, target, weight)
    b.graph.outputs.append(_scalar(b.op("Identity", np.array(0, np.float32), name="loss")))
    for accumulator in found:
        held = b.input(f"a.{accumulator.name}", "float32", accumulator.shape)
        new = b.op("Add", held, accumulator.added, name=f"a.{accumulator.name}.next")
        new.shape, new.type = held.shape, held.type
        b.graph.outputs.append(new)
    return found


_ORDER = ("d", "f", "r", "p", "s", "e", "n", "a", "p0", "c", "h")


def _finished(model: ir.Model, program_id: str) -> ir.Model:
    """Simplify, drop inputs that nothing reads, put inputs in the order of the contract, strip what is not needed."""
    tidy(model)
    graph = model.graph
    used = [value for value in graph.inputs if value.uses() or value.name == "d.x"]
    # d.y and d.w lead, in this order; within a class the order is that in which they were made: the table's.
    graph.inputs[:] = sorted(used, key=lambda value: _class_of(str(value.name)))
    infer_shapes(model)
    for node in graph:
        node.doc_string = None
        node.metadata_props.clear()
    graph.doc_string = None
    graph.name = program_id
    model.ir_version = IR_VERSION
    graph.opset_imports.clear()
    graph.opset_imports[""] = OPSET
    model.producer_name, model.producer_version, model.doc_string = "edgewise", None, None
    model.metadata_props.clear()
    model.metadata_props.update({"edgewise.contract": "1", "edgewise.program": program_id})
    return model


def _class_of(name: str) -> tuple[int, int]:
    kind = name.split(".", 1)[0]
    slot = int(kind[1:]) if kind[0] == "s" and kind[1:].isdigit() else 0
    return _ORDER.index("s" if kind[0] == "s" else kind), slot


def _table_name(p: ir.Value) -> str:
    return str(p.name).removeprefix("p.")


def check_contract(model: ir.Model, program_id: str) -> None:
    """I1, I9 and I13 of step-graphs.md, section 2.6. Raises `ContractError` naming invariant and value."""
    graph = model.graph

    def broken(invariant: str, finding: str) -> ContractError:
        return ContractError(f"{program_id}: {invariant}: {finding}")

    for node in graph:
        if node.domain not in ("", "ai.onnx"):
            raise broken("I9", f"node {node.name!r} is {node.domain}::{node.op_type}, no standard operator")
    if graph.num_nodes() > NODES_LIMIT or len(graph.inputs) > INPUTS_LIMIT:
        raise broken("I13", f"{graph.num_nodes()} nodes, {len(graph.inputs)} inputs")
    inputs = {str(value.name): value for value in graph.inputs}
    for output in graph.outputs:
        name = str(output.name)
        if not name.endswith(".next"):
            continue
        state = inputs.get(name.removesuffix(".next"))
        if state is None or dims(state) != dims(output) or state.dtype != output.dtype:
            raise broken("I1", f"{name} has no input of its shape and dtype")


def operators(model: ir.Model) -> list[str]:
    """The operators of a graph, sorted."""
    return sorted({node.op_type for node in model.graph})


def constants(model: ir.Model) -> dict[str, Array]:
    """The constants of a graph by name."""
    return {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }
