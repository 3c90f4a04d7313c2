"""The cut is exact, and the step below it neither computes nor differentiates anything frozen."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edge_sdk.bundle import Bundle
from edge_sdk.runtime import RuntimeProfile, Stepper
from export import ProgramSpec, build_bundle
from export.cut import Cut, cut
from export.forward import adopt
from export.graph import clone
from export.losses import loss_named
from export.optimizers import optimizer_named
from export.quantize.weights import quantize_weights
from export.scopes import Applied, scope_named
from export.step_graph import Graphs, build_graphs, gradients_graph
from export.torch_import import forward_graph
from tests.export.models import NETS


class Residual(nn.Module):
    """A block whose connection skips two convolutions, and the classifier behind the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.first, self.second = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.third, self.head = nn.Conv2d(6, 6, 1), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        inner = self.third(torch.relu(self.second(torch.relu(self.first(x)))))
        return self.head(torch.relu(x + inner).mean((2, 3)))


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(7, 24), nn.Linear(24, 24), nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))))


SHAPES: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    **NETS,
    "residual": (Residual, (2, 9, 9)),
    "deep": (Deep, (7,)),
}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("mlp", "head", {}),
    ("deep", "layer", {"modules": ["second", "third"]}),
    ("deep", "lora", {"rank": 2, "targets": ["second", "third"]}),
    ("conv1d", "head", {}),
    ("conv1d", "layer", {"modules": ["conv2", "head"]}),
    ("conv1d", "lora", {"rank": 2, "targets": ["conv2", "head"]}),
    ("conv2d", "head", {}),
    ("conv2d", "layer", {"modules": ["grouped"]}),
    ("conv2d", "lora", {"rank": 2, "targets": ["head"]}),
    ("residual", "head", {}),
    ("residual", "layer", {"modules": ["third"]}),
    ("residual", "lora", {"rank": 2, "targets": ["second", "third"]}),
]


def module_of(name: str) -> nn.Module:
    torch.manual_seed(3)
    return SHAPES[name][0]().eval()


def data_of(name: str, count: int = 16) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(5)
    return draw.normal(size=(count, *SHAPES[name][1])).astype(np.float32), draw.integers(0, 4, count)


@functools.cache
def exported_of(name: str) -> tuple[ir.Model, list[str]]:
    module = module_of(name)
    model = forward_graph(module, data_of(name)[0][:2])
    return model, [n for n, _ in module.named_parameters() if n in model.graph.initializers]


def forward_of(name: str, scope: str, options: dict[str, Any], precision: str) -> tuple[ir.Model, Applied]:
    exported, parameters = exported_of(name)
    model = clone(exported)
    applied = scope_named(scope, options).apply(model, parameters, 0)
    if precision == "int8":
        quantize_weights(model)
    return model, applied


def graphs_of(name: str, scope: str, options: dict[str, Any], precision: str = "float") -> tuple[Graphs, Applied]:
    model, applied = forward_of(name, scope, options, precision)
    loss, optimizer = loss_named("cross_entropy"), optimizer_named("sgd")
    return build_graphs(model, applied.trainables, loss, optimizer, "test", data_of(name)[0]), applied


def run(model: ir.Model, feeds: dict[str, np.ndarray], *, fuse_sums: bool = True) -> dict[str, np.ndarray]:
    """`fuse_sums` = False: without the runtime's last optimizations, which begin a convolution's sum with another term."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if not fuse_sums:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {v.name: feeds[v.name] for v in session.get_inputs()}), strict=True))


@pytest.mark.parametrize("precision", ["float", "int8"])
@pytest.mark.parametrize(("name", "scope", "options"), CASES, ids=[f"{n}-{s}" for n, s, _ in CASES])
def test_the_step_behind_the_prefix_equals_the_uncut_one_bit_for_bit(
    name: str, scope: str, options: dict[str, Any], precision: str
) -> None:
    model, applied = forward_of(name, scope, options, precision)
    graphs, _ = graphs_of(name, scope, options, precision)
    assert graphs.prefix is not None
    whole = gradients_graph(model, applied.trainables, loss_named("cross_entropy"), "test")
    for batch in (1, 5, 16):
        _assert_exact(graphs, whole, applied, name, batch)


def _assert_exact(graphs: Graphs, uncut: ir.Model, applied: Applied, name: str, batch: int) -> None:
    assert graphs.prefix is not None
    x, y = data_of(name, batch)
    draw = np.random.default_rng(1)
    feeds = {"d.x": x, "d.y": y, "d.w": draw.uniform(0.5, 1, batch).astype(np.float32)}
    # Away from the start, where a factor of every adapter is zero.
    feeds |= {
        f"p.{t.name}": (t.value + draw.normal(0, 0.1, t.value.shape)).astype(np.float32) for t in applied.trainables
    }
    for fuse_sums in (False, True):
        whole = run(uncut, feeds, fuse_sums=fuse_sums)
        made = run(graphs.prefix, feeds, fuse_sums=fuse_sums)
        behind = run(graphs.gradients, {**feeds, **made}, fuse_sums=fuse_sums)
        assert whole.keys() == behind.keys()
        for key, value in whole.items():
            # Which of two sums is fused into a convolution is the runtime's choice, and another one where one is cut off.
            tolerance = 1e-6 * np.abs(value).max() if fuse_sums and name == "residual" else 0
            np.testing.assert_allclose(behind[key], value, rtol=0, atol=tolerance, err_msg=key)


@pytest.mark.parametrize(("name", "scope", "options"), CASES, ids=[f"{n}-{s}" for n, s, _ in CASES])
def test_no_node_of_the_step_reads_a_weight_below_the_frontier(name: str, scope: str, options: dict[str, Any]) -> None:
    graphs, applied = graphs_of(name, scope, options)
    assert graphs.prefix is not None
    frozen = {
        n for n, v in graphs.prefix.graph.initializers.items() if v.const_value is not None and v.const_value.size > 20
    }
    trained = {t.name.rpartition(".")[0] for t in applied.trainables}
    adapted = {n for n in frozen if scope == "lora" and n.rpartition(".")[0] in trained}
    read = set(graphs.step.graph.initializers) | set(graphs.evaluate.graph.initializers)
    assert frozen
    assert not (frozen - adapted) & read
    assert "d.x" not in {value.name for value in graphs.step.graph.inputs}


def test_a_scope_that_trains_everything_has_no_prefix() -> None:
    for name in ("mlp", "conv1d", "conv2d"):
        for scope, options in (("full", {}), ("lora", {"rank": 2})):
            graphs, _ = graphs_of(name, scope, options)
            assert graphs.prefix is None, (name, scope)
            assert graphs.features.reason == "no frozen prefix"
            assert "d.x" in {value.name for value in graphs.step.graph.inputs}


def cut_of(name: str, scope: str, options: dict[str, Any]) -> Cut:
    return cut(forward_of(name, scope, options, "float")[0], data_of(name)[0])


def test_a_connection_over_the_cut_is_a_second_feature_and_is_reported() -> None:
    over = cut_of("residual", "layer", {"modules": ["third"]})
    assert over.skips
    assert len(over.features.values) == 2
    assert over.features.bytes == 2 * 6 * 9 * 9 * 4
    assert not cut_of("residual", "head", {}).skips
    assert not cut_of("conv1d", "layer", {"modules": ["conv2", "head"]}).skips


def test_the_base_product_beside_an_adapter_is_no_feature() -> None:
    found = cut_of("deep", "lora", {"rank": 2, "targets": ["second", "third"]})
    assert len(found.features.values) == 1
    assert found.features.bytes == 24 * 4


# Foreign graphs, for what torch does not write.


def foreign(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], shape: list[int]) -> ir.Model:
    """A frozen product, then `nodes` from `h` to `z`, then the trained product."""
    draw = np.random.default_rng(0)
    values = {
        "first": draw.normal(0, 0.3, (shape[-1], 6)).astype(np.float32),
        "last": draw.normal(0, 0.3, (6, 4)).astype(np.float32),
        **constants,
    }
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "first"], ["h"]), *nodes, helper.make_node("MatMul", ["z", "last"], ["y"])],
        "foreign",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    model = adopt(ir.from_proto(proto), "foreign.onnx")
    scope_named("head", {}).apply(model, ["last"], 0)
    return model


X = np.random.default_rng(1).normal(size=(8, 5)).astype(np.float32)


def test_a_prefix_that_looks_at_the_whole_batch_is_not_cacheable_and_says_so() -> None:
    axes = np.array([0], np.int64)
    nodes = [helper.make_node("ReduceMean", ["h", "axes"], ["m"]), helper.make_node("Sub", ["h", "m"], ["z"])]
    found = cut(foreign(nodes, {"axes": axes}, [5]), X).features
    assert not found.cacheable
    assert "depend on the others in its batch" in found.reason
    quantized = [
        helper.make_node("DynamicQuantizeLinear", ["h"], ["q", "s", "o"]),
        helper.make_node("DequantizeLinear", ["q", "s", "o"], ["z"]),
    ]
    found = cut(foreign(quantized, {}, [5]), X).features
    assert not found.cacheable
    assert "DynamicQuantizeLinear" in found.reason
    plain = cut(foreign([helper.make_node("Tanh", ["h"], ["z"])], {}, [5]), X).features
    assert plain.cacheable
    assert plain.reason == ""


def test_codes_cross_the_cut_rather_than_what_they_dequantize_to() -> None:
    constants = {"s": np.array(0.02, np.float32), "o": np.array(128, np.uint8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["h", "s", "o"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "o"], ["d"]),
        helper.make_node("Relu", ["d"], ["z"]),
    ]
    model = foreign(nodes, constants, [5])
    found = cut(model, X)
    assert (found.features.dtype, found.features.bytes) == ("uint8", 6)
    assert found.prefix is not None
    assert [node.op_type for node in found.rest.graph] == ["DequantizeLinear", "Relu", "MatMul"]
    p = {"p.last": np.random.default_rng(2).normal(size=(6, 4)).astype(np.float32)}
    (whole,) = run(versioned(model), {"d.x": X, **p}).values()
    (behind,) = run(versioned(found.rest), {**run(versioned(found.prefix), {"d.x": X}), **p}).values()
    np.testing.assert_array_equal(whole, behind)


def versioned(model: ir.Model) -> ir.Model:
    copy = clone(model)
    copy.ir_version = 10
    return copy


def test_a_batch_size_read_below_the_cut_is_read_off_the_feature() -> None:
    """`Shape` of a frozen value, used behind the cut, would need the whole prefix."""
    nodes = [
        helper.make_node("Shape", ["h"], ["s"], start=0, end=1),
        helper.make_node("Concat", ["s", "six"], ["target"], axis=0),
        helper.make_node("Expand", ["token", "target"], ["t"]),
        helper.make_node("Tanh", ["h"], ["z0"]),
        helper.make_node("MatMul", ["z0", "last2"], ["z1"]),
        helper.make_node("Add", ["z1", "t"], ["z"]),
    ]
    constants = {
        "six": np.array([6], np.int64),
        "token": np.ones((1, 6), np.float32),
        "last2": np.eye(6, dtype=np.float32),
    }
    model = foreign(nodes, constants, [5])
    value = model.graph.initializers["last2"]
    del model.graph.initializers["last2"]
    value.name, value.const_value = "p.last2", None
    model.graph.inputs.append(value)
    found = cut(model, X)
    assert found.prefix is not None
    assert [v.name for v in found.rest.graph.inputs if str(v.name).startswith(("d.", "f."))] == ["f.0"]
    p = {"p.last": np.ones((6, 4), np.float32), "p.last2": np.eye(6, dtype=np.float32)}
    for count in (1, 5):
        (whole,) = run(versioned(model), {"d.x": X[:count], **p}).values()
        (behind,) = run(versioned(found.rest), {**run(versioned(found.prefix), {"d.x": X[:count]}), **p}).values()
        np.testing.assert_array_equal(whole, behind)


# In a bundle.


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    path = tmp_path_factory.mktemp("cut") / "net.bundle"
    build_bundle(
        module_of("conv1d"),
        data_of("conv1d"),
        path,
        name="net",
        loss="cross_entropy",
        programs=[ProgramSpec("layer", {"modules": ["conv2", "head"]}, "int8", "sgd", accumulate=True, largest=5)],
    )
    with Bundle.open(path) as bundle:
        yield bundle


def test_a_bundle_names_prefix_and_features_and_its_program_learns(opened: Bundle) -> None:
    program = next(iter(opened.programs.values()))
    evaluate = opened.program(str(program.evaluate))
    assert program.prefix == evaluate.prefix
    assert program.features.cacheable
    assert program.features.nbytes == 6 * 10 * 4
    x, y = data_of("conv1d", 5)
    steps = Stepper(opened, program, opened.initial(program))
    losses = [steps.step({"d.x": x, "d.y": y}, {"lr": 0.1}).loss for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_large_batch_in_parts_equals_the_large_batch(opened: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "whole.bundle"
    build_bundle(
        module_of("conv1d"),
        data_of("conv1d"),
        path,
        name="net",
        loss="cross_entropy",
        programs=[ProgramSpec("layer", {"modules": ["conv2", "head"]}, "int8", "sgd")],
    )
    x, y = data_of("conv1d", 16)
    w = np.random.default_rng(0).uniform(0, 1, 16).astype(np.float32)
    w[[3, 4, 5, 6, 7, 8]] = 0
    batch = {"d.x": x, "d.y": y, "d.w": w}
    program = next(iter(opened.programs.values()))
    with Bundle.open(path) as whole:
        other = next(iter(whole.programs.values()))
        assert program.batch_largest == 5
        assert other.batch_largest is None
        parts, once = Stepper(opened, program, opened.initial(program)), Stepper(whole, other, whole.initial(other))
        for _ in range(4):
            left, right = parts.step(batch, {"lr": 0.1}), once.step(batch, {"lr": 0.1})
            assert left.loss == pytest.approx(right.loss, abs=1e-6)
        assert parts.tensors().keys() == once.tensors().keys()
        for name, value in once.tensors().items():
            np.testing.assert_allclose(parts.tensors()[name], value, atol=1e-6, err_msg=name)


def test_a_memory_limit_makes_parts_smaller(opened: Bundle) -> None:
    program = next(iter(opened.programs.values()))
    x, y = data_of("conv1d", 16)
    each = program.cost["step_bytes_per_sample"]
    ample, tight = (
        Stepper(opened, program, opened.initial(program), RuntimeProfile(memory_bytes=int(count * each), cache_bytes=0))
        for count in (100, 2)
    )
    for steps in (ample, tight):
        steps.step({"d.x": x, "d.y": y})
    assert (ample.prefix_runs, tight.prefix_runs) == (4, 8)
