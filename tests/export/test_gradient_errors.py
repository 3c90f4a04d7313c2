"""What a user reads when a model cannot be trained as asked: every message of step-graphs.md, section 11, word for word.

The texts lie in `golden/`; `EDGEWISE_GOLDEN=write pytest tests/export/test_gradient_errors.py` writes them anew.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.errors import ContractError, ExportError, NoGradientRule
from export.gradients import STOP_GRADIENT, differentiate
from export.graph import IR_VERSION, OPSET, Builder, constant, tidy
from export.onnx_import import forward_graph
from export.scopes import scope_named
from export.shapes import BATCH, infer_shapes
from export.step_graph import check_contract

GOLDEN = Path(__file__).parent / "golden"


def check(name: str, error: ExportError) -> None:
    text = f"{type(error).__name__}: {error}\n"
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("EDGEWISE_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()


def builder() -> Builder:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="net")
    return Builder(graph)


def weight(b: Builder, name: str, *shape: int) -> ir.Value:
    value = constant(name, np.ones(shape, np.float32))
    b.graph.register_initializer(value)
    return value


def named(value: ir.Value, name: str) -> ir.Value:
    producer = value.producer()
    assert producer is not None
    producer.name = name
    return value


def loss_of(b: Builder, y: ir.Value) -> ir.Value:
    loss = b.op("ReduceSum", y, keepdims=0)
    infer_shapes(ir.Model(b.graph, ir_version=IR_VERSION))
    return loss


def failure(act: Callable[[], object]) -> ExportError:
    with pytest.raises(ExportError) as caught:
        act()
    return caught.value


def test_all_operators_without_a_rule_are_named_with_their_path_and_what_lies_behind_them() -> None:
    b = builder()
    embed = b.input("p.embed.weight", "float32", (10, 4))
    x = b.op("Gather", embed, b.input("d.x", "int64", (BATCH, 3)))
    x = named(b.op("Sinh", x), "encoder/sinh")
    x = named(b.op("Resize", x, None, np.float32([1, 1, 2])), "encoder/resize")
    y = b.op("MatMul", x, weight(b, "head.weight", 8, 2))
    error = failure(lambda: differentiate(b, loss_of(b, b.op("Add", y, weight(b, "head.bias", 2))), [embed]))
    assert isinstance(error, NoGradientRule)
    assert [finding.operator for finding in error.findings] == ["Sinh", "Resize"]
    check("no_gradient_rule", error)


@pytest.mark.parametrize(
    ("op_type", "shape", "attributes"),
    [
        ("MaxPool", (BATCH, 3, 8), {"kernel_shape": [2], "storage_order": 1}),
        ("AveragePool", (BATCH, 3, 8), {"kernel_shape": [2], "strides": [2], "ceil_mode": 1}),
    ],
)
def test_an_attribute_that_a_rule_does_not_cover_is_named(op_type: str, shape: tuple, attributes: dict) -> None:
    b = builder()
    scale = b.input("p.scale", "float32", (3, 1))
    y = named(b.op(op_type, b.op("Mul", b.input("d.x", "float32", shape), scale), **attributes), "pool")
    check(f"attribute_{op_type}", failure(lambda: differentiate(b, loss_of(b, y), [scale])))


def test_an_output_that_a_rule_does_not_cover_is_named() -> None:
    b = builder()
    scale = b.input("p.scale", "float32", (8,))
    x = b.op("Mul", b.input("d.x", "float32", (BATCH, 8)), scale)
    _, mean = b.ops(2, "LayerNormalization", x, weight(b, "gamma", 8))
    check("output", failure(lambda: differentiate(b, loss_of(b, named(mean, "norm")), [scale])))


@pytest.mark.parametrize("op_type", ["ArgMax", "Round"])
def test_a_trainable_that_reaches_the_loss_through_integers_only_is_named(op_type: str) -> None:
    b = builder()
    w, other = b.input("p.w", "float32", (8, 4)), b.input("p.other", "float32", (4,))
    y = named(b.op(op_type, b.op("MatMul", b.input("d.x", "float32", (BATCH, 8)), w)), "choice")
    y = b.op("Add", b.op("Cast", y, to=1), other)
    check(f"not_differentiable_{op_type}", failure(lambda: differentiate(b, loss_of(b, y), [w, other])))


def test_a_stopped_gradient_is_none() -> None:
    b = builder()
    w, other = b.input("p.w", "float32", (4,)), b.input("p.other", "float32", (4,))
    stopped = b.op("Identity", w)
    producer = stopped.producer()
    assert producer is not None
    producer.metadata_props[STOP_GRADIENT] = "1"
    loss = loss_of(b, b.op("Mul", b.op("Add", stopped, w), other))
    model = ir.Model(b.graph, ir_version=IR_VERSION)
    found = differentiate(b, loss, [w, other])
    b.graph.outputs.extend(b.op("Identity", found[value], name=f"grad.{value.name}") for value in (w, other))
    tidy(model)
    from onnx.reference import ReferenceEvaluator

    values = {"p.w": np.float32([1, 2, 3, 4]), "p.other": np.float32([5, 6, 7, 8])}
    result = ReferenceEvaluator(ir.to_proto(model)).run(["grad.p.w", "grad.p.other"], values)
    assert result[0].tolist() == [5, 6, 7, 8]
    assert result[1].tolist() == [2, 4, 6, 8]


def test_an_axis_that_may_repeat_or_not_is_named() -> None:
    b = builder()
    a, c = b.input("d.x", "float32", (BATCH, 3)), b.input("p.c", "float32", ("other", 3))
    y = b.op("Add", a, c)
    y.shape, y.type = ir.Shape((BATCH, 3)), ir.TensorType(ir.DataType.FLOAT)
    check("unknown_shape", failure(lambda: differentiate(b, b.op("ReduceSum", y, keepdims=0), [c])))


def test_one_disconnected_trainable_is_a_warning_and_all_are_an_error(caplog: pytest.LogCaptureFixture) -> None:
    b = builder()
    w, lost = b.input("p.w", "float32", (4,)), b.input("p.lost", "float32", (4,))
    loss = loss_of(b, b.op("Mul", b.input("d.x", "float32", (BATCH, 4)), w))
    with caplog.at_level(logging.WARNING):
        differentiate(b, loss, [w, lost])
    assert caplog.messages == ["p.lost does not influence the loss: its gradient is zero"]
    check("disconnected", failure(lambda: differentiate(b, loss, [lost])))


@pytest.mark.parametrize(
    ("scope", "options"),
    [("layer", {"modules": ["heed"]}), ("lora", {"targets": ["cnv1"]}), ("lora", {"targets": ["zzz"]})],
)
def test_a_pattern_that_matches_nothing_names_the_nearest(tmp_path: Path, scope: str, options: dict) -> None:
    model = forward_graph(saved(tmp_path / "net.onnx", linear(), OPSET))
    parameters = ["conv1.weight", "head.weight"]
    chosen = scope_named(scope, options)
    check(f"unknown_tensor_{next(iter(options.values()))[0]}", failure(lambda: chosen.apply(model, parameters, 0)))


def linear(**changes: object) -> onnx.GraphProto:
    """x [n, 3, 8] -> Conv -> Flatten -> Gemm."""
    weights = {"conv1.weight": np.ones((5, 3, 3)), "head.weight": np.ones((30, 4))}
    nodes = [
        helper.make_node("Conv", ["x", "conv1.weight"], ["c"], "conv1"),
        helper.make_node("Flatten", ["c"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "head.weight"], ["y"], "head"),
    ]
    return helper.make_graph(
        [*nodes, *changes.get("nodes", [])],  # type: ignore[misc]
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, changes.get("shape", ["n", 3, 8]))],
        [
            helper.make_tensor_value_info(
                str(changes.get("output", "y")), TensorProto.FLOAT, changes.get("sizes", ["n", 4])
            )
        ],
        [
            numpy_helper.from_array(value.astype(changes.get("dtype", np.float32)), name)  # type: ignore[arg-type]
            for name, value in weights.items()
        ],
    )


def saved(path: Path, graph: onnx.GraphProto, opset: int = OPSET) -> Path:
    path.write_bytes(
        helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("com.example", 1)], ir_version=10
        ).SerializeToString()
    )
    return path


def branch(name: str, sign: float) -> onnx.GraphProto:
    value = helper.make_node("Constant", [], [name], value=helper.make_tensor("v", TensorProto.FLOAT, [1], [sign]))
    return helper.make_graph([value], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])])


UNSUPPORTED = {
    "control_flow": linear(
        nodes=[
            helper.make_node("Constant", [], ["truth"], value=helper.make_tensor("t", TensorProto.BOOL, [], [True])),
            helper.make_node(
                "If", ["truth"], ["s"], "choose", then_branch=branch("a", 1.0), else_branch=branch("b", -1.0)
            ),
            helper.make_node("Mul", ["y", "s"], ["z"]),
        ],
        output="z",
    ),
    "two_symbols": linear(shape=["n", 3, "length"], sizes=["n", None]),
    "static_batch": linear(shape=[1, 3, 8], sizes=[1, 4]),
    "foreign_operator": linear(
        nodes=[helper.make_node("Fancy", ["y"], ["z"], "odd", domain="com.example")], output="z"
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_model_that_cannot_be_read_says_what_was_found_and_where(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(Path("net.onnx"), UNSUPPORTED[name])
    check(f"unsupported_{name}", failure(lambda: forward_graph(Path("net.onnx"))))


def test_weights_in_double_precision_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    graph = linear(dtype=np.float64)
    for entry in (*graph.input, *graph.output):
        entry.type.tensor_type.elem_type = TensorProto.DOUBLE
    saved(Path("net.onnx"), graph)
    check("unsupported_double", failure(lambda: forward_graph(Path("net.onnx"))))


def test_a_state_without_its_successor_breaks_the_contract() -> None:
    b = builder()
    p = b.input("p.w", "float32", (4,))
    y = b.op("Mul", p, 2.0, name="p.v.next")
    y.shape, y.type = ir.Shape((4,)), ir.TensorType(ir.DataType.FLOAT)
    b.graph.outputs.append(y)
    check("contract", failure(lambda: check_contract(ir.Model(b.graph, ir_version=IR_VERSION), "net/full/float")))
    assert issubclass(ContractError, ExportError)
