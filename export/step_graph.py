"""Assembles the graphs of a program from a forward graph: `infer`, `prefix`, `step`, `evaluate`, `gradients`, `apply`.

The contract of names, order, types and versions is step-graphs.md, section 2; `check_contract` is what the writer relies
on.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edge_sdk.tensors import Array
from export.cut import NOTHING_FROZEN, Cut, Features, cut
from export.decompose import decompose
from export.errors import ContractError, SpecError
from export.gradients import differentiate
from export.graph import IR_VERSION, OPSET, Builder, clone, dims, tidy
from export.losses import Accumulator, Loss
from export.optimizers import Optimizer, append_optimizer
from export.precision import FLOAT, Precision
from export.quantize.fake import fake_quantize
from export.scopes import Trainable
from export.shapes import BATCH, infer_shapes

log = logging.getLogger(__name__)

NODES_LIMIT = 20_000  # I13
INPUTS_LIMIT = 4_096


@dataclass(frozen=True)
class Graphs:
    """The graphs of one program that trains, and of the one that evaluates it.

    `prefix` is None where nothing is frozen below the trained tensors; `step` and `evaluate` read its features.
    `gradients` and `apply` are `step` in two, for batches that do not fit at once.
    """

    infer: ir.Model
    prefix: ir.Model | None
    step: ir.Model
    evaluate: ir.Model
    gradients: ir.Model
    apply: ir.Model
    accumulators: tuple[Accumulator, ...]
    features: Features

    def files(self, *, accumulate: bool) -> dict[str, ir.Model]:
        """The graphs that a bundle holds, by kind."""
        found = {"infer": self.infer, "step": self.step, "evaluate": self.evaluate}
        if self.prefix is not None:
            found["prefix"] = self.prefix
        return {**found, "gradients": self.gradients, "apply": self.apply} if accumulate else found


def build_graphs(
    forward: ir.Model,
    trainables: Sequence[Trainable],
    loss: Loss,
    optimizer: Optimizer,
    program_id: str,
    example: Array | None = None,
    constants: Sequence[Trainable] = (),
    precision: Precision = FLOAT,
) -> Graphs:
    """All graphs of a program from `forward` (`d.x`, `p.*` in; one output). Raises `ExportError`.

    `example`: of `d.x` `[n, *shape]`, by which the frozen part is tried for what may be kept of it; without one nothing is
    cut off. `constants`: further inputs, which are given with the start and do not train. `precision`: which graphs get
    fake quantizers; constant weights are the caller's.
    """
    names = [trainable.name for trainable in trainables]

    def step(b: Builder, output: ir.Value, target: ir.Value, weight: ir.Value) -> None:
        _, outputs = append_optimizer(b, optimizer, _differentiated(b, loss, output, target, weight, names))
        b.graph.outputs.extend(outputs)

    parts = Cut(None, forward, NOTHING_FROZEN) if example is None else cut(forward, example)
    infer, served = clone(forward), parts.rest
    if precision.serves:
        infer, served = (quantized(model, trainables, precision) for model in (forward, parts.rest))
    stepped = served if precision.trains else parts.rest
    infer.graph.outputs[0].name = "y.0"
    evaluate, accumulators = accumulating_graph(served, loss, program_id)
    graphs = Graphs(
        infer=finished(infer, program_id),
        prefix=None if parts.prefix is None else finished(parts.prefix, program_id),
        step=_with_loss(stepped, loss, step, program_id),
        evaluate=evaluate,
        gradients=gradients_graph(stepped, trainables, loss, program_id),
        apply=finished(_apply(trainables, optimizer), program_id),
        accumulators=accumulators,
        features=parts.features,
    )
    for model in graphs.files(accumulate=True).values():
        check_contract(model, program_id, rests=[t.graph_name for t in constants])
    table = {t.graph_name: t.value.shape for t in (*trainables, *constants)}
    check_program(graphs, table, program_id)
    return graphs


def quantized(forward: ir.Model, trainables: Sequence[Trainable], precision: Precision) -> ir.Model:
    """The graph with its trained weights, and what enters their layers, fake-quantized. Raises `SpecError` for none."""
    model = clone(forward)
    assert precision.bits is not None
    weights = [t.graph_name for t in trainables if t.merge == "mean"]  # an adapter stays outside every quantizer
    if not fake_quantize(model, weights, precision.bits):
        raise SpecError(
            f"precision {precision.name} quantizes the weights that train, and none does: adapters stay float32; "
            "take int8, or a scope that trains the weights of layers"
        )
    return model


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
    return finished(model, "loss")


def _apply(trainables: Sequence[Trainable], optimizer: Optimizer) -> ir.Model:
    """`p.*`, `grad.*`, slots and hyper-parameters in, the new state out: the optimizer alone."""
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="apply"), ir_version=IR_VERSION)
    b = Builder(model.graph)
    tensors = [b.input(f"p.{t.name}", "float32", t.value.shape) for t in trainables]
    found = [b.input(f"grad.{t.name}", "float32", t.value.shape) for t in trainables]
    _, outputs = append_optimizer(b, optimizer, dict(zip(tensors, found, strict=True)))
    model.graph.outputs.extend(outputs)
    return model


def accumulating_graph(forward: ir.Model, loss: Loss, program_id: str) -> tuple[ir.Model, tuple[Accumulator, ...]]:
    """`d.x`, `d.y`, `d.w` and accumulators in, the accumulators after this batch out: how held-out samples are scored."""
    found: list[Accumulator] = []

    def accumulate(b: Builder, output: ir.Value, target: ir.Value, weight: ir.Value) -> None:
        found.extend(_accumulate(b, loss, output, target, weight))

    model = _with_loss(forward, loss, accumulate, program_id)
    return model, tuple(found)


def _with_loss(
    forward: ir.Model, loss: Loss, append: Callable[[Builder, ir.Value, ir.Value, ir.Value], None], program_id: str
) -> ir.Model:
    model = clone(forward)
    b, output, target, weight = _data_inputs(model, loss)
    model.graph.outputs.clear()
    append(b, output, target, weight)
    return finished(model, program_id)


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
    loss_free(b)
    for accumulator in found:
        held = b.input(f"a.{accumulator.name}", "float32", accumulator.shape)
        new = b.op("Add", held, accumulator.added, name=f"a.{accumulator.name}.next")
        new.shape, new.type = held.shape, held.type
        b.graph.outputs.append(new)
    return found


def loss_free(b: Builder) -> None:
    """The loss of a program that has none: an output of zero."""
    b.graph.outputs.append(_scalar(b.op("Identity", np.array(0, np.float32), name="loss")))


_ORDER = ("d", "f", "r", "grad", "p", "s", "e", "n", "a", "p0", "c", "h")


def finished(model: ir.Model, program_id: str) -> ir.Model:
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


_STATE = re.compile(r"(p|s\d+|e|n|a)\.[A-Za-z0-9_.]+")
_NAME = re.compile(r"(d|f|r|grad|p|s\d+|e|n|a|p0|c|h)\.[A-Za-z0-9_.]+")


def check_contract(model: ir.Model, program_id: str, rests: Collection[str] = ()) -> None:
    """Names, I1, I9 and I13 of step-graphs.md, section 2, for one graph. Raises `ContractError` naming invariant and value.

    `rests`: inputs of a class of state that are given and stay as they are.
    """
    graph = model.graph
    for node in graph:
        if node.domain not in ("", "ai.onnx"):
            raise _broken(
                program_id, "I9", f"node {node.name!r} is {node.domain}::{node.op_type}, no standard operator"
            )
    if graph.num_nodes() > NODES_LIMIT or len(graph.inputs) > INPUTS_LIMIT:
        raise _broken(program_id, "I13", f"{graph.num_nodes()} nodes, {len(graph.inputs)} inputs")
    inputs = {str(value.name): value for value in graph.inputs}
    for name in inputs:
        if not _NAME.fullmatch(name) or name.endswith(".next"):
            raise _broken(program_id, "2.2", f"an input is called {name!r}")
    new = {str(value.name): value for value in graph.outputs if str(value.name).endswith(".next")}
    for name, output in new.items():
        state = inputs.get(name.removesuffix(".next"))
        if state is None or dims(state) != dims(output) or state.dtype != output.dtype:
            raise _broken(program_id, "I1", f"{name} has no input of its shape and dtype")
    # A graph that writes accumulators only reads all other tensors as constants; one that writes nothing is no step.
    written = {name.split(".", 1)[0] for name in new}
    for name in inputs if written else ():
        held = _STATE.fullmatch(name)
        if (
            name not in rests
            and held is not None
            and (held[1] == "a" or written != {"a"})
            and f"{name}.next" not in new
        ):
            raise _broken(program_id, "I1", f"{name} has no output {name}.next")


def check_program(graphs: Graphs, table: Mapping[str, tuple[int, ...]], program_id: str) -> None:
    """I4 and I7: the graphs of a program agree with the tensor table and with each other. Raises `ContractError`.

    `table`: the shape of every tensor that trains or is given with the start, by graph name.
    """
    for kind, model in graphs.files(accumulate=True).items():
        for value in model.graph.inputs:
            name = str(value.name)
            if name.startswith(("p.", "n.", "c.")) and table.get(name) != dims(value):
                raise _broken(
                    program_id, "I4", f"{name} of {kind} is {list(dims(value))}, the table has {table.get(name)}"
                )
    read_by_step = {str(value.name) for value in graphs.step.graph.inputs}
    for name in table:
        if name not in read_by_step:
            raise _broken(program_id, "I4", f"the step does not read {name}")
    made = {} if graphs.prefix is None else {str(value.name): value for value in graphs.prefix.graph.outputs}
    for kind, model in {"step": graphs.step, "evaluate": graphs.evaluate, "gradients": graphs.gradients}.items():
        read = {str(value.name): value for value in model.graph.inputs if str(value.name).startswith("f.")}
        for name in sorted(read.keys() - made.keys() if kind != "step" else read.keys() ^ made.keys()):
            raise _broken(program_id, "I7", f"{name} is not both made by the prefix and read by {kind}")
        for name, value in read.items():
            if dims(value) != dims(made[name]) or value.dtype != made[name].dtype:
                raise _broken(
                    program_id,
                    "I7",
                    f"{name} of {kind} is {value.dtype} {list(dims(value))}, "
                    f"of the prefix {made[name].dtype} {list(dims(made[name]))}",
                )


def _broken(program_id: str, invariant: str, finding: str) -> ContractError:
    return ContractError(f"{program_id}: {invariant}: {finding}")


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
