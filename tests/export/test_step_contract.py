"""The writer refuses graphs that break their contract, with the number of the rule and the name of the value (SG6)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edge_sdk.bundle import GRAPH_LIMIT
from export.errors import ContractError
from export.forward import trainable_constants
from export.graph import Builder, clone
from export.losses import loss_named
from export.onnx_import import forward_graph
from export.optimizers import optimizer_named
from export.quantize.weights import quantize_weights
from export.scopes import scope_named
from export.serialize import WeightFile, write_graphs
from export.step_graph import INPUTS_LIMIT, NODES_LIMIT, Graphs, build_graphs, check_contract, check_program
from tests.cut_bundle import cut_data, cut_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Graphs, dict[str, tuple[int, ...]]]:
    model = forward_graph(cut_model(tmp_path_factory.mktemp("net") / "net.onnx"))
    applied = scope_named("layer", {"modules": ["b", "c"]}).apply(model, trainable_constants(model.graph), 0)
    loss, optimizer = loss_named("cross_entropy"), optimizer_named("adamw")
    graphs = build_graphs(model, applied.trainables, loss, optimizer, "net", cut_data(8)[0])
    return graphs, {t.graph_name: t.value.shape for t in applied.trainables}


@pytest.fixture
def graphs(made: tuple[Graphs, dict[str, tuple[int, ...]]]) -> Graphs:
    return made[0]


def value(model: ir.Model, name: str) -> ir.Value:
    return next(v for v in [*model.graph.inputs, *model.graph.outputs] if v.name == name)


def without_a_successor(model: ir.Model) -> None:
    model.graph.outputs.remove(value(model, "s1.b.bias.next"))


def without_a_state(model: ir.Model) -> None:
    model.graph.inputs.remove(value(model, "s0.c.weight"))


def of_another_shape(model: ir.Model) -> None:
    value(model, "p.b.bias.next").shape = ir.Shape((1, 12))


def of_another_dtype(model: ir.Model) -> None:
    value(model, "p.b.bias.next").type = ir.TensorType(ir.DataType.DOUBLE)


def with_a_foreign_operator(model: ir.Model) -> None:
    next(iter(model.graph)).domain = "com.microsoft"


def with_a_nameless_class(model: ir.Model) -> None:
    value(model, "h.lr").name = "lr"


def with_too_many_nodes(model: ir.Model) -> None:
    builder = Builder(model.graph)
    for _ in range(NODES_LIMIT):
        builder.op("Identity", model.graph.inputs[0])


def with_too_many_inputs(model: ir.Model) -> None:
    builder = Builder(model.graph)
    for index in range(INPUTS_LIMIT):
        builder.input(f"c.{index}", "float32", ())


BROKEN: list[tuple[Callable[[ir.Model], None], str]] = [
    (without_a_successor, "net: I1: s1.b.bias has no output s1.b.bias.next"),
    (without_a_state, "net: I1: s0.c.weight.next has no input of its shape and dtype"),
    (of_another_shape, "net: I1: p.b.bias.next"),
    (of_another_dtype, "net: I1: p.b.bias.next"),
    (with_a_foreign_operator, "net: I9: node .* is com.microsoft::"),
    (with_a_nameless_class, "net: 2.2: an input is called 'lr'"),
    (with_too_many_nodes, "net: I13: 2.... nodes"),
    (with_too_many_inputs, "net: I13: .* inputs"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN, ids=[change.__name__ for change, _ in BROKEN])
def test_a_graph_that_breaks_the_contract_is_not_written(
    graphs: Graphs, change: Callable[[ir.Model], None], message: str
) -> None:
    model = clone(graphs.step)
    check_contract(model, "net")
    change(model)
    with pytest.raises(ContractError, match=message):
        check_contract(model, "net")


def test_graphs_that_do_not_fit_each_other_are_not_written(made: tuple[Graphs, dict[str, tuple[int, ...]]]) -> None:
    graphs, table = made
    check_program(graphs, table, "net")
    with pytest.raises(ContractError, match=r"net: I4: p\.c\.bias of \w+ is \[3\], the table has \(4,\)"):
        check_program(graphs, {**table, "p.c.bias": (4,)}, "net")
    with pytest.raises(ContractError, match=r"net: I4: the step does not read p\.more"):
        check_program(graphs, {**table, "p.more": (4,)}, "net")
    assert graphs.prefix is not None
    wide = clone(graphs.prefix)
    wide.graph.outputs[0].shape = ir.Shape(("batch", 13))
    with pytest.raises(ContractError, match=r"net: I7: f\.0 of step is FLOAT \['batch', 12\], of the prefix .*13"):
        check_program(dataclasses.replace(graphs, prefix=wide), table, "net")
    with pytest.raises(ContractError, match=r"net: I7: f\.0 is not both made by the prefix and read by step"):
        check_program(dataclasses.replace(graphs, prefix=None), table, "net")


def test_a_graph_file_of_more_than_16_megabytes_is_not_written(graphs: Graphs) -> None:
    model = clone(graphs.infer)
    builder = Builder(model.graph)
    for index in range(GRAPH_LIMIT // 1000 + 1):  # each is small enough to stay inside the file
        made = builder.op("Add", builder.const(np.full(250, index, np.float32)), 1.0)
    model.graph.outputs.append(made)
    with pytest.raises(ContractError, match="I13: the graph takes"):
        write_graphs([model], WeightFile())


def test_no_quantizer_stands_between_a_trained_tensor_and_its_product(tmp_path: Path) -> None:
    model = forward_graph(cut_model(tmp_path / "net.onnx"))
    scope_named("lora", {"rank": 2}).apply(model, trainable_constants(model.graph), 0)
    quantize_weights(model)
    trained = {v for v in model.graph.inputs if str(v.name).startswith("p.")}
    found = 0
    for node in model.graph:
        quantizer = "quantize" in node.op_type.lower()
        found += quantizer
        if any(v in trained for v in node.inputs):  # what follows from trained tensors, if from nothing else
            assert not quantizer, node.name
            trained.update(node.outputs)
    assert found == 3
