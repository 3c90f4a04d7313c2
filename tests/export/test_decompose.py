"""Operators that are taken apart: the same function afterwards, and gradients that equal torch's or central differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional

from export.decompose import DECOMPOSITIONS, decompose
from export.errors import NoGradientRule
from export.gradients import differentiate
from export.graph import IR_VERSION, OPSET, Builder, clone, dims, tidy
from export.shapes import BATCH, infer_shapes, size_at

B = BATCH
X, M = (B, 3, 8), (B, 4, 6, 6)


@dataclass(frozen=True)
class Case:
    """An operator on inputs `in.<i>` of these shapes, then constants; `torch`: the same function."""

    shapes: Sequence[tuple[int | str, ...]]
    torch: Callable[..., Any] | None
    constants: Sequence[Any] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1
    runs: bool = True  # whether the runtime has a kernel of its own to compare with


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


LABELS = ints(0, 2, 1, 2, 0)
CLASS_WEIGHTS = np.float32([0.5, 1.0, 2.0])


def cross_entropy(**options: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda z: functional.cross_entropy(z, torch.tensor(LABELS), **options)


def einsum(equation: str) -> Callable[..., torch.Tensor]:
    return lambda *operands: torch.einsum(equation, *operands)


CASES: dict[str, list[Case]] = {
    "Elu": [Case([X], lambda x: functional.elu(x, 0.7), attributes={"alpha": 0.7})],
    "Selu": [Case([X], functional.selu)],
    "Celu": [Case([X], lambda x: functional.celu(x, 0.7), attributes={"alpha": 0.7})],
    "Mish": [Case([X], functional.mish)],
    "Softsign": [Case([X], functional.softsign)],
    "PRelu": [Case([X, (3, 1)], lambda x, slope: functional.prelu(x, slope[:, 0]))],
    "ThresholdedRelu": [Case([X], lambda x: functional.threshold(x, 0.5, 0.0), attributes={"alpha": 0.5})],
    "Sum": [Case([X, X, (8,)], lambda a, c, d: a + c + d), Case([X], lambda a: a)],
    "Mean": [Case([X, X, (8,)], lambda a, c, d: (a + c + d) / 3)],
    "Max": [Case([X, X, X], lambda a, c, d: torch.maximum(torch.maximum(a, c), d))],
    "Min": [Case([X, X, X], lambda a, c, d: torch.minimum(torch.minimum(a, c), d))],
    "ReduceL1": [Case([X], lambda x: x.abs().sum(1), [ints(1)], {"keepdims": 0})],
    "ReduceSumSquare": [Case([X], lambda x: (x * x).sum((1, 2), keepdim=True), [ints(1, 2)])],
    "ReduceLogSum": [Case([X], lambda x: x.sum(1).log(), [ints(1)], {"keepdims": 0})],
    "ReduceMin": [Case([X], lambda x: x.amin(2, keepdim=True), [ints(2)])],
    "GlobalMaxPool": [Case([M], lambda x: x.amax((2, 3), keepdim=True))],
    "GroupNormalization": [
        Case([M, (4,), (4,)], lambda x, g, b: functional.group_norm(x, 2, g, b), attributes={"num_groups": 2}),
        Case([(B, 4, 6), (4,), (4,)], lambda x, g, b: functional.group_norm(x, 1, g, b), attributes={"num_groups": 1}),
    ],
    "InstanceNormalization": [
        Case(
            [M, (4,), (4,)],
            lambda x, g, b: functional.instance_norm(x, weight=g, bias=b, eps=1e-3),
            attributes={"epsilon": 1e-3},
        )
    ],
    "MeanVarianceNormalization": [
        Case([M], lambda x: (x - x.mean((0, 2, 3), True)) / x.std((0, 2, 3), unbiased=False, keepdim=True))
    ],
    "BatchNormalization": [
        Case(
            [M, (4,), (4,)],
            lambda x, g, b: functional.batch_norm(x, None, None, g, b, training=True, eps=1e-3),
            [np.zeros(4, np.float32), np.ones(4, np.float32)],
            {"training_mode": 1, "epsilon": 1e-3},
            outputs=3,
            runs=False,
        )
    ],
    "SoftmaxCrossEntropyLoss": [
        Case([(5, 3)], cross_entropy(), [LABELS], {"reduction": "mean"}),
        Case([(5, 3)], cross_entropy(reduction="sum"), [LABELS], {"reduction": "sum"}),
        Case([(5, 3)], cross_entropy(reduction="none"), [LABELS], {"reduction": "none"}),
        Case([(5, 3)], cross_entropy(weight=torch.tensor(CLASS_WEIGHTS).double()), [LABELS, CLASS_WEIGHTS]),
        Case([(5, 3)], cross_entropy(ignore_index=2), [LABELS], {"ignore_index": 2}),
    ],
    "NegativeLogLikelihoodLoss": [
        Case([(5, 3)], lambda p: functional.nll_loss(p, torch.tensor(LABELS)), [LABELS]),
        Case(
            [(5, 3, 4)],
            lambda p: functional.nll_loss(p, torch.tensor(LABELS)[:, None].expand(5, 4)),
            [np.repeat(LABELS[:, None], 4, 1)],
        ),
    ],
    "Einsum": [
        Case([(B, 4), (4, 5)], einsum("bi,ij->bj"), attributes={"equation": "bi,ij->bj"}),
        Case([(B, 6, 2, 4), (B, 7, 2, 4)], einsum("bqhd,bkhd->bhqk"), attributes={"equation": "bqhd,bkhd->bhqk"}),
        Case([(B, 3, 4, 5), (4, 5, 6)], einsum("bshd,hde->bse"), attributes={"equation": "bshd,hde->bse"}),
        Case([(B, 4), (B, 4)], einsum("bi,bi->b"), attributes={"equation": "bi,bi->b"}),
        Case([(B, 4), (B, 5)], einsum("bi,bj->ij"), attributes={"equation": "bi,bj"}),
        Case([X], einsum("bij->ji"), attributes={"equation": "bij->ji"}),
    ],
    "DepthToSpace": [
        Case([M], lambda x: functional.pixel_shuffle(x, 2), attributes={"blocksize": 2, "mode": "CRD"}),
        Case([M], None, attributes={"blocksize": 2}),
    ],
    "SpaceToDepth": [Case([M], None, attributes={"blocksize": 2})],
    "Tile": [Case([X], lambda x: x.repeat(1, 2, 3), [ints(1, 2, 3)])],
    "Conv": [  # a trained depth-wise one: of a small map as products, of a narrow one turned
        Case(
            [M, (4, 1, 3, 3), (4,)],
            lambda x, w, c: functional.conv2d(x, w, c, padding=1, groups=4),
            attributes={"group": 4, "pads": [1, 1, 1, 1]},
        ),
        Case(
            [M, (4, 1, 3, 2)],
            lambda x, w: functional.conv2d(x, w, stride=(2, 1), groups=4),
            attributes={"group": 4, "strides": [2, 1]},
        ),
        Case(
            [(B, 2, 40, 10), (2, 1, 3, 3), (2,)],
            lambda x, w, c: functional.conv2d(x, w, c, stride=(1, 2), padding=(1, 0), groups=2),
            attributes={"group": 2, "strides": [1, 2], "pads": [1, 0, 1, 0]},
        ),
    ],
    "CastLike": [Case([X], lambda x: x, [np.float32(1)], runs=False)],
}
ALL = [pytest.param(op, case, id=f"{op}-{number}") for op, cases in CASES.items() for number, case in enumerate(cases)]


def test_every_decomposition_has_cases() -> None:
    assert set(CASES) == set(DECOMPOSITIONS) - {"LSTM", "GRU"}  # these in test_recurrent.py


@pytest.mark.parametrize(("op_type", "case"), ALL)
def test_taken_apart_it_is_the_same_function_with_the_gradients_of_torch(op_type: str, case: Case) -> None:
    whole, parts = graphs(op_type, case)
    feeds = drawn(parts, positive=op_type == "ReduceLogSum")
    outputs = [value.name for value in parts.graph.outputs]
    found = dict(zip(outputs, session(parts).run(outputs, feeds), strict=True))
    if case.runs:
        np.testing.assert_allclose(
            found["y"],
            session(whole).run(["y"], {n: v for n, v in feeds.items() if n != "weight"})[0],
            rtol=2e-5,
            atol=2e-6,
        )
    if case.torch is None:
        return
    names = [name for name in feeds if name.startswith("in.")]
    leaves = [torch.tensor(feeds[name], dtype=torch.float64, requires_grad=True) for name in names]
    y = case.torch(*leaves)
    np.testing.assert_allclose(found["y"], y.detach().numpy(), rtol=2e-5, atol=2e-6)
    weight = torch.tensor(feeds["weight"]).double()
    expected = torch.autograd.grad((y * (weight + y)).sum(), leaves)
    for name, reference in zip(names, expected, strict=True):
        off = np.abs(found[f"grad.{name}"] - reference.numpy()).max()
        assert off <= 1e-5 * max(1.0, float(reference.abs().max())), name


def graphs(op_type: str, case: Case) -> tuple[ir.Model, ir.Model]:
    """The operator with output `y`, and the same decomposed with the gradients of a weighted sum of y and y^2."""
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="rule"), ir_version=IR_VERSION)
    b = Builder(model.graph)
    values = [b.input(f"in.{index}", "float32", shape) for index, shape in enumerate(case.shapes)]
    y = b.ops(case.outputs, op_type, *values, *case.constants, **case.attributes)[0]
    infer_shapes(model)
    y.name = "y"
    model.graph.outputs.append(y)
    whole = clone(model)
    weight = b.input("weight", "float32", dims(y))
    loss = b.op("ReduceSum", b.op("Mul", y, b.op("Add", weight, y)), keepdims=0, name="loss")
    decompose(b, loss, values)
    for value, gradient in differentiate(b, loss, values).items():
        named = b.op("Identity", gradient, name=f"grad.{value.name}")
        named.shape, named.type = value.shape, value.type
        model.graph.outputs.append(named)
    tidy(model)
    return whole, model


def drawn(model: ir.Model, *, positive: bool, batch: int = 5) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(3)
    feeds = {}
    for value in model.graph.inputs:
        shape = [size_at(size, batch) for size in dims(value)]
        array = draw.normal(size=shape)
        # Logarithms want positive numbers; they are the only ones here to which a sign matters.
        feeds[str(value.name)] = np.abs(array).astype(np.float32) + 0.1 if positive else array.astype(np.float32)
    return feeds


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)


def test_what_does_not_train_keeps_its_operator() -> None:
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="rule"), ir_version=IR_VERSION)
    b = Builder(model.graph)
    x, w = b.input("x", "float32", M), b.input("w", "float32", (4, 1, 1))
    ones, zeros = np.ones(4, np.float32), np.zeros(4, np.float32)
    below = b.op("InstanceNormalization", x, ones, zeros)
    above = b.op("InstanceNormalization", b.op("Mul", below, w), ones, zeros)
    loss = b.op("ReduceSum", b.op("Mul", above, above), keepdims=0)
    decompose(b, loss, [w])
    assert [node.op_type for node in b.graph].count("InstanceNormalization") == 1


def test_a_large_input_of_an_exponential_has_a_finite_gradient() -> None:
    for op_type in ("Elu", "Selu", "Celu", "Mish"):
        _, parts = graphs(op_type, Case([(B, 2)], None))
        found = session(parts).run(
            ["grad.in.0"], {"in.0": np.float32([[200, -200]]), "weight": np.ones((1, 2), np.float32)}
        )
        assert np.isfinite(found[0]).all(), op_type


@pytest.mark.parametrize("equation", ["...i,ij->...j", "ii->i", "a,b,c->abc"])
def test_other_sums_of_products_have_no_rule(equation: str) -> None:
    shapes = {"...i,ij->...j": [X, (8, 4)], "ii->i": [(4, 4)], "a,b,c->abc": [(2,), (3,), (4,)]}[equation]
    with pytest.raises(NoGradientRule, match="Einsum"):
        graphs("Einsum", Case(shapes, None, attributes={"equation": equation}))


def test_statistics_of_the_batch_move_the_running_ones() -> None:
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="rule"), ir_version=IR_VERSION)
    b = Builder(model.graph)
    x, gamma = b.input("x", "float32", M), b.input("gamma", "float32", (4,))
    running = [b.const(np.float32([1, 2, 3, 4])), b.const(np.float32([0.5, 1, 2, 3]))]
    y, mean, variance = b.ops(
        3, "BatchNormalization", x, gamma, np.zeros(4, np.float32), *running, training_mode=1, momentum=0.8
    )
    mean.name, variance.name = "mean", "variance"
    loss = b.op("ReduceSum", y, keepdims=0)
    model.graph.outputs.extend([mean, variance])
    decompose(b, loss, [gamma])
    value = np.random.default_rng(0).normal(size=(5, 4, 6, 6)).astype(np.float32)
    norm = nn.BatchNorm2d(4, momentum=0.2)
    norm.running_mean[:] = torch.tensor([1.0, 2, 3, 4])
    norm.running_var[:] = torch.tensor([0.5, 1, 2, 3])
    norm(torch.tensor(value))
    tidy(model)
    found = session(model).run(["mean", "variance"], {"x": value, "gamma": np.ones(4, np.float32)})
    np.testing.assert_allclose(found[0], norm.running_mean.numpy(), rtol=1e-5)
    bessel = 5 * 36 / (5 * 36 - 1)  # torch keeps the unbiased variance, ONNX the biased one
    batch = (norm.running_var.numpy() - 0.8 * np.float32([0.5, 1, 2, 3])) / bessel
    np.testing.assert_allclose(found[1], 0.8 * np.float32([0.5, 1, 2, 3]) + batch, rtol=1e-5)


@pytest.mark.parametrize(
    ("trained", "folded"),
    [({"w"}, True), ({"w", "gamma"}, True), ({"beta"}, True), ({"gamma"}, False), ({"gamma", "beta"}, False)],
)
def test_a_norm_becomes_part_of_its_convolution_unless_only_its_scale_trains(trained: set[str], folded: bool) -> None:
    """The gradient of a scale in the weight is that of a whole convolution."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="norm")
    b = Builder(graph)
    draw = np.random.default_rng(0)
    sizes = {"w": (4, 3, 3, 3), "gamma": (4,), "beta": (4,), "mean": (4,), "variance": (4,)}
    x = b.input("d.x", "float32", (BATCH, 3, 6, 6))
    held = {
        name: b.input(f"p.{name}", "float32", shape)
        if name in trained
        else b.const(draw.uniform(0.5, 1.5, shape).astype(np.float32))
        for name, shape in sizes.items()
    }
    y = b.op("BatchNormalization", b.op("Conv", x, held["w"]), *(held[n] for n in list(sizes)[1:]))
    loss = b.op("ReduceSum", b.op("Mul", y, y), keepdims=0)
    graph.outputs.append(loss)
    decompose(b, loss, [held[name] for name in sorted(trained)])
    assert ("BatchNormalization" not in [node.op_type for node in graph]) is folded
