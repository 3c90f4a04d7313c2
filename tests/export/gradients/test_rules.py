"""Every rule of the differentiation pass: against central differences in float64, and against torch in float32.

The loss is a weighted sum of the operator's outputs and their squares, the weights being drawn like the inputs, so that
every element of an output has a gradient of its own.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch.nn import functional

from export.decompose import DECOMPOSITIONS
from export.gradients import STRAIGHT_THROUGH, differentiate, rules
from export.graph import IR_VERSION, OPSET, Builder, dims, tidy
from export.proof import evaluator
from export.shapes import BATCH, infer_shapes

B = BATCH
X, M = (B, 3, 8), (B, 2, 6, 6)
RECURRENT = ("GRU", "LSTM")  # registered by export.recurrent
INTS = np.int64


@dataclass(frozen=True)
class Case:
    """An operator on inputs of these shapes (those that are differentiated), then constants, with attributes.

    `torch`: the same function of torch tensors. `positive`: inputs are drawn above 0.3. `outputs`: how many the node has.
    """

    shapes: Sequence[tuple[int | str, ...]]
    constants: Sequence[Any] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    torch: Callable[..., Any] | None = None
    positive: bool = False
    outputs: int = 1
    first: Sequence[Any] = ()  # constants before the inputs
    torch_only: bool = False  # where ONNX's reference evaluator is wrong or refuses


def ints(*values: int) -> np.ndarray:
    return np.array(values, INTS)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


CONDITION = np.arange(24).reshape(3, 8) % 3 == 0
REPEATED = np.array([[0, 2], [2, 2]], INTS)
PICKED = np.arange(2 * 8).reshape(2, 8) % 3

CASES: dict[str, list[Case]] = {
    "Add": [
        Case([X, X], torch=torch.add),
        Case([X, (3, 1)], torch=torch.add),
        Case([(8,), X], torch=torch.add),
        Case([(B, 1, 8), X], torch=torch.add),
    ],
    "Sub": [Case([X, X], torch=torch.sub), Case([X, (3, 1)], torch=torch.sub), Case([(), X], torch=torch.sub)],
    "Mul": [Case([X, X], torch=torch.mul), Case([X, (1, 3, 1)], torch=torch.mul), Case([(8,), X], torch=torch.mul)],
    "Div": [
        Case([X, (3, 1)], torch=torch.div, positive=True),
        Case([(3, 1), X], torch=torch.div, positive=True),
    ],
    "Max": [Case([X, X], torch=torch.maximum), Case([X, (8,)], torch=torch.maximum)],
    "Min": [Case([X, X], torch=torch.minimum), Case([X, (3, 1)], torch=torch.minimum)],
    "Neg": [Case([X], torch=torch.neg)],
    "Abs": [Case([X], torch=torch.abs)],
    "Exp": [Case([X], torch=torch.exp)],
    "Log": [Case([X], torch=torch.log, positive=True)],
    "Sqrt": [Case([X], torch=torch.sqrt, positive=True)],
    "Reciprocal": [Case([X], torch=torch.reciprocal, positive=True)],
    "Pow": [
        Case([X], [np.float32(2)], torch=lambda x: x**2),
        Case([X], [np.float32(3)], torch=lambda x: x**3),
        Case([X], [np.int64(3)], torch=lambda x: x**3),
        Case([X], [np.float32(-0.5)], torch=lambda x: x**-0.5, positive=True),
        Case([(8,)], [np.full((3, 8), 1.5, np.float32)], torch=lambda x: x.expand(3, 8) ** 1.5, positive=True),
    ],
    "Relu": [Case([X], torch=torch.relu)],
    "LeakyRelu": [
        Case([X], torch=lambda x: functional.leaky_relu(x, 0.01)),
        Case([X], attributes={"alpha": 0.3}, torch=lambda x: functional.leaky_relu(x, 0.3)),
    ],
    "Clip": [
        Case([X], [np.float32(-0.5), np.float32(0.7)], torch=lambda x: x.clamp(-0.5, 0.7)),
        Case([X], [None, np.float32(0.4)], torch=lambda x: x.clamp(max=0.4)),
    ],
    "Sigmoid": [Case([X], torch=torch.sigmoid)],
    "HardSigmoid": [
        Case([X], attributes={"alpha": 1 / 6}, torch=functional.hardsigmoid),
        Case([X], attributes={"alpha": 0.7}, torch=lambda x: (0.7 * x + 0.5).clamp(0, 1)),
    ],
    "HardSwish": [Case([X], torch=functional.hardswish), Case([(B, 40)], torch=functional.hardswish)],
    "Tanh": [Case([X], torch=torch.tanh)],
    "Erf": [Case([X], torch=torch.erf)],
    "Gelu": [
        Case([X], torch=functional.gelu),
        Case([X], attributes={"approximate": "tanh"}, torch=lambda x: functional.gelu(x, approximate="tanh")),
    ],
    "Softplus": [Case([X], torch=functional.softplus)],
    "Where": [
        Case([X, X], first=[CONDITION], torch=lambda a, c: torch.where(torch.tensor(CONDITION), a, c)),
        Case([(3, 1), X], first=[CONDITION], torch=lambda a, c: torch.where(torch.tensor(CONDITION), a, c)),
    ],
    "Cast": [Case([X], attributes={"to": 1}, torch=lambda x: x)],
    "Softmax": [
        Case([X], torch=lambda x: x.softmax(-1)),
        Case([X], attributes={"axis": 1}, torch=lambda x: x.softmax(1)),
    ],
    "LogSoftmax": [
        Case([X], attributes={"axis": -1}, torch=lambda x: x.log_softmax(-1)),
        Case([X], attributes={"axis": 1}, torch=lambda x: x.log_softmax(1)),
    ],
    "ReduceSum": [
        Case([X], [ints(1)], {"keepdims": 0}, torch=lambda x: x.sum(1)),
        Case([X], [ints(2, 0)], {"keepdims": 1}, torch=lambda x: x.sum((0, 2), keepdim=True)),
        Case([X], attributes={"keepdims": 0}, torch=torch.sum),
        Case([X], attributes={"noop_with_empty_axes": 1}, torch=lambda x: x),
    ],
    "ReduceMean": [
        Case([X], [ints(-1)], {"keepdims": 1}, torch=lambda x: x.mean(-1, keepdim=True)),
        Case([X], [ints(0, 1)], {"keepdims": 0}, torch=lambda x: x.mean((0, 1))),
    ],
    "ReduceMax": [
        Case([X], [ints(-1)], {"keepdims": 1}, torch=lambda x: x.amax(-1, keepdim=True)),
        Case([X], [ints(1, 2)], {"keepdims": 0}, torch=lambda x: x.amax((1, 2))),
    ],
    "ReduceL2": [
        Case([X], [ints(-1)], {"keepdims": 1}, torch=lambda x: x.norm(dim=-1, keepdim=True)),
        Case([X], [ints(1)], {"keepdims": 0}, torch=lambda x: x.norm(dim=1)),
    ],
    "ReduceLogSumExp": [
        Case([X], [ints(-1)], {"keepdims": 1}, torch=lambda x: x.logsumexp(-1, keepdim=True)),
        Case([X], [ints(0, 2)], {"keepdims": 0}, torch=lambda x: x.logsumexp((0, 2))),
    ],
    "MatMul": [
        Case([X, (8, 5)], torch=torch.matmul),
        Case([X, (1, 8, 5)], torch=torch.matmul),
        Case([(5, 3), X], torch=torch.matmul),
        Case([(B, 2, 3, 4), (B, 2, 4, 5)], torch=torch.matmul),
        Case([(B, 8), (8, 5)], torch=torch.matmul),
    ],
    "Gemm": [
        Case([(B, 5), (5, 4), (4,)], torch=lambda a, b, c: a @ b + c),
        Case(
            [(B, 5), (4, 5), (1,)],
            attributes={"transB": 1, "alpha": 0.5, "beta": 2.0},
            torch=lambda a, b, c: 0.5 * a @ b.T + 2 * c,
        ),
        Case([(5, B), (5, 4)], attributes={"transA": 1}, torch=lambda a, b: a.T @ b),
        Case([(5, B), (4, 5)], attributes={"transA": 1, "transB": 1}, torch=lambda a, b: a.T @ b.T),
    ],
    "Conv": [
        Case([X, (4, 3, 3), (4,)], attributes={"pads": [1, 1]}, torch=lambda *a: functional.conv1d(*a, padding=1)),
        Case([X, (4, 3, 3)], attributes={"strides": [2]}, torch=lambda *a: functional.conv1d(*a, stride=2)),
        Case([X, (4, 3, 2)], attributes={"strides": [3], "pads": [1, 0]}),
        Case([X, (4, 3, 3)], attributes={"dilations": [2], "pads": [2, 2]}),
        Case([X, (4, 3, 1)], torch=functional.conv1d),
        Case([X, (4, 3, 1)], attributes={"strides": [2]}, torch=lambda *a: functional.conv1d(*a, stride=2)),
        Case([X, (4, 3, 2)], attributes={"pads": [3, 3]}, torch=lambda *a: functional.conv1d(*a, padding=3)),
        Case([X, (3, 1, 3)], attributes={"group": 3}, torch=lambda *a: functional.conv1d(*a, groups=3)),
        Case([X, (6, 1, 3)], attributes={"group": 3, "pads": [1, 1]}),
        Case(
            [M, (4, 2, 3, 3), (4,)],
            attributes={"pads": [1, 1, 1, 1], "strides": [2, 1]},
            torch=lambda *a: functional.conv2d(*a, padding=1, stride=(2, 1)),
        ),
        Case([M, (4, 2, 3, 3)], attributes={"pads": [0, 1, 2, 1]}),
        Case([M, (4, 1, 3, 3), (4,)], attributes={"group": 2}, torch=lambda *a: functional.conv2d(*a, groups=2)),
        Case([(B, 4, 5, 5), (6, 2, 3, 3)], attributes={"group": 2}, torch=lambda *a: functional.conv2d(*a, groups=2)),
        Case([M, (2, 1, 3, 2)], attributes={"group": 2, "strides": [2, 2]}),
        Case(
            [M, (2, 1, 3, 3), (2,)],
            attributes={"group": 2, "pads": [1, 1, 1, 1]},
            torch=lambda *a: functional.conv2d(*a, groups=2, padding=1),
        ),
        Case([M, (2, 1, 3, 3)], attributes={"group": 2, "pads": [1, 1, 1, 1], "strides": [2, 2]}),
    ],
    "ConvTranspose": [
        Case(
            [(B, 3, 5), (3, 2, 3), (2,)],
            attributes={"strides": [2]},
            torch=lambda *a: functional.conv_transpose1d(*a, stride=2),
        ),
        Case(
            [(B, 3, 4, 4), (3, 2, 3, 3), (2,)],
            attributes={"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]},
            torch=lambda *a: functional.conv_transpose2d(*a, stride=2, padding=1, output_padding=1),
        ),
        Case(
            [(B, 4, 3, 3), (4, 1, 2, 2)],
            attributes={"group": 2},
            torch=lambda *a: functional.conv_transpose2d(*a, groups=2),
            torch_only=True,
        ),
        Case(
            [(B, 2, 5), (2, 3, 3)],
            attributes={"dilations": [2]},
            torch=lambda *a: functional.conv_transpose1d(*a, dilation=2),
        ),
    ],
    "BatchNormalization": [
        Case(
            [M, (2,), (2,)],
            [floats(0.3, -0.2), floats(0.8, 1.7)],
            {"epsilon": 1e-3},
            torch=lambda x, g, b: functional.batch_norm(
                x, torch.tensor([0.3, -0.2]).double(), torch.tensor([0.8, 1.7]).double(), g, b, eps=1e-3
            ),
        ),
        Case([(B, 2), (2,), (2,)], [floats(0.3, -0.2), floats(0.8, 1.7)]),
    ],
    "LayerNormalization": [
        Case([X, (8,), (8,)], torch=lambda x, g, b: functional.layer_norm(x, (8,), g, b)),
        Case(
            [X, (3, 8), (3, 8)],
            attributes={"axis": 1, "epsilon": 1e-3},
            torch=lambda x, g, b: functional.layer_norm(x, (3, 8), g, b, eps=1e-3),
        ),
        Case([X, (8,)], torch=lambda x, g: functional.layer_norm(x, (8,), g)),
    ],
    "MaxPool": [
        Case([X], attributes={"kernel_shape": [2], "strides": [2]}, torch=lambda x: functional.max_pool1d(x, 2)),
        Case([X], attributes={"kernel_shape": [3], "strides": [3]}, torch=lambda x: functional.max_pool1d(x, 3)),
        Case([X], attributes={"kernel_shape": [3], "strides": [2], "pads": [1, 1]}),
        Case([X], attributes={"kernel_shape": [2], "dilations": [2]}),
        Case([X], attributes={"kernel_shape": [3], "strides": [2], "ceil_mode": 1}),
        Case([M], attributes={"kernel_shape": [2, 3], "strides": [2, 3]}),
        Case(
            [M],
            attributes={"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
            torch=lambda x: functional.max_pool2d(x, 3, 2, 1),
        ),
    ],
    "AveragePool": [
        Case([X], attributes={"kernel_shape": [2], "strides": [2]}, torch=lambda x: functional.avg_pool1d(x, 2)),
        Case([X], attributes={"kernel_shape": [3], "strides": [3]}, torch=lambda x: functional.avg_pool1d(x, 3)),
        Case([X], attributes={"kernel_shape": [3], "strides": [2], "pads": [1, 1]}),
        Case([M], attributes={"kernel_shape": [2, 3], "strides": [2, 3]}),
        Case(
            [M],
            attributes={"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 0], "count_include_pad": 1},
            torch=lambda x: functional.avg_pool2d(x, (3, 2), 2, (1, 0)),
        ),
    ],
    "GlobalAveragePool": [Case([M], torch=lambda x: x.mean((2, 3), keepdim=True))],
    "Reshape": [
        Case([X], [ints(-1, 4, 6)], torch=lambda x: x.reshape(-1, 4, 6)),
        Case([X], [ints(0, -1)], torch=lambda x: x.flatten(1)),
        Case([X], [ints(-1, 8)], torch=lambda x: x.reshape(-1, 8)),
    ],
    "Flatten": [Case([X], attributes={"axis": 1}, torch=lambda x: x.flatten(1))],
    "Squeeze": [Case([(B, 1, 4)], [ints(1)], torch=lambda x: x.squeeze(1))],
    "Unsqueeze": [Case([X], [ints(1)], torch=lambda x: x.unsqueeze(1))],
    "Transpose": [
        Case([X], attributes={"perm": [2, 0, 1]}, torch=lambda x: x.permute(2, 0, 1)),
        Case([X], torch=lambda x: x.permute(2, 1, 0)),
    ],
    "Identity": [Case([X], torch=lambda x: x)],
    "Expand": [
        Case([(3, 1)], [ints(2, 3, 8)], torch=lambda x: x.expand(2, 3, 8)),
        Case([(B, 1, 8)], [ints(1, 3, 1)], torch=lambda x: x.expand(-1, 3, -1)),
    ],
    "Concat": [
        Case([X, (B, 3, 2), X], attributes={"axis": 2}, torch=lambda *a: torch.cat(a, 2)),
        Case([X, (1, 3, 8), X], attributes={"axis": 0}, torch=lambda *a: torch.cat(a, 0)),
    ],
    "Split": [
        Case([X], [ints(3, 5)], {"axis": 2}, torch=lambda x: x.split([3, 5], 2), outputs=2),
        Case([X], [], {"axis": -1, "num_outputs": 3}, torch=lambda x: x.split(3, 2), outputs=3),
    ],
    "Pad": [
        Case([X], [ints(0, 0, 1, 0, 0, 2)], torch=lambda x: functional.pad(x, (1, 2))),
        Case([X], [ints(1, -2), None, ints(-1)], torch=lambda x: functional.pad(x, (1, -2)), torch_only=True),
        Case([X], [ints(1, 0), np.float32(3), ints(1)], torch=lambda x: functional.pad(x, (0, 0, 1, 0), value=3.0)),
    ],
    "Slice": [
        Case([X], [ints(1), ints(6), ints(2)], torch=lambda x: x[:, :, 1:6]),
        Case([X], [ints(-3, 0), ints(2**40, 2), ints(2, 1), ints(1, 1)], torch=lambda x: x[:, :2, -3:]),
        Case([X], [ints(1), ints(8), ints(2), ints(3)], torch=lambda x: x[:, :, 1::3]),
        Case([X], [ints(-1), ints(-(2**40)), ints(2), ints(-1)], torch=lambda x: x.flip(2)),
        Case([X], [ints(6, 0), ints(0, 2), ints(2, 1), ints(-2, 1)], torch=lambda x: x[:, :2].flip(2)[:, :, 1:7:2]),
    ],
    "Gather": [
        Case([X], [np.array(2, INTS)], {"axis": 2}, torch=lambda x: x[:, :, 2]),
        Case([X], [np.array(-1, INTS)], {"axis": 1}, torch=lambda x: x[:, -1]),
        Case([X], [ints(2, 0)], {"axis": 1}, torch=lambda x: x[:, [2, 0]]),
        Case([(5, 4)], [REPEATED], {"axis": 0}, torch=lambda x: x[torch.tensor(REPEATED)]),
        Case([X], [REPEATED], {"axis": 1}, torch=lambda x: x[:, torch.tensor(REPEATED)]),
    ],
    "GatherElements": [
        Case([(3, 8)], [PICKED], {"axis": 0}, torch=lambda x: x.gather(0, torch.tensor(PICKED))),
        Case([(4, 6)], [PICKED[:, :6].repeat(2, 0)], {"axis": 1}),
    ],
    "TopK": [
        Case([X], [ints(3)], outputs=2, torch=lambda x: x.topk(3)[0]),
        Case([X], [ints(2)], {"axis": 1, "largest": 0}, outputs=2, torch=lambda x: x.topk(2, 1, largest=False)[0]),
    ],
}
# These have no derivative in the ordinary sense; their own tests stand below.
STRAIGHT = {"QuantizeLinear", "DequantizeLinear", "Round"}
ALL = [pytest.param(op, case, id=f"{op}-{number}") for op, cases in CASES.items() for number, case in enumerate(cases)]


def test_every_rule_has_cases_and_every_case_a_rule() -> None:
    assert set(CASES) | STRAIGHT == rules()


def test_the_documentation_lists_every_rule_and_every_operator_that_is_taken_apart() -> None:
    text = (Path(__file__).parents[3] / "docs" / "gradient-rules.md").read_text()
    table, _, rest = text.partition("## Operators that are taken apart")
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in row.split()} == rules()
    listed = re.sub(
        r"\(.*?\)", "", rest.partition("they stay as they are:")[2].partition("LSTM and GRU:")[0], flags=re.DOTALL
    )
    assert {name.strip(" .\n") for name in listed.split(",")} == set(DECOMPOSITIONS) | set(RECURRENT)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("op_type", "case"), [case for case in ALL if not case.values[1].torch_only])
def test_gradient_equals_central_differences(op_type: str, case: Case, batch: int) -> None:
    model = gradient_graph(op_type, case, range(len(case.shapes)))
    reference = evaluator(model)
    feeds = drawn(model, case, batch, np.float64)
    draw = np.random.default_rng(7)
    for index in range(len(case.shapes)):
        name = f"in.{index}"
        gradient = reference.run([f"grad.{index}"], feeds)[0]
        assert gradient.shape == feeds[name].shape
        for direction in directions(gradient.shape, draw):
            expected = slope(lambda f: float(reference.run(["loss"], f)[0]), feeds, name, direction)
            assert (gradient * direction).sum() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("op_type", "case"), [case for case in ALL if case.values[1].torch is not None])
def test_gradient_equals_torch(op_type: str, case: Case, batch: int) -> None:
    assert case.torch is not None
    model = gradient_graph(op_type, case, range(len(case.shapes)))
    feeds = drawn(model, case, batch, np.float32)
    leaves = [torch.tensor(feeds[f"in.{i}"], dtype=torch.float64, requires_grad=True) for i in range(len(case.shapes))]
    outputs = case.torch(*leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    weights = [torch.tensor(feeds[name]).double() for name in feeds if name.startswith("weight.")]
    loss = sum((y * (w + y)).sum() for y, w in zip(outputs, weights, strict=True))
    expected = torch.autograd.grad(loss, leaves)
    found = session(model).run([f"grad.{i}" for i in range(len(leaves))], feeds)
    largest = max(float(value.abs().max()) for value in expected)
    for gradient, reference in zip(found, expected, strict=True):
        scale = max(float(reference.abs().max()), 1e-6 * largest)
        assert gradient.shape == reference.shape
        assert np.abs(gradient - reference.numpy()).max() <= 1e-5 * scale


@pytest.mark.parametrize(("op_type", "case"), [case for case in ALL if len(case.values[1].shapes) > 1])
def test_what_is_not_wanted_changes_nothing(op_type: str, case: Case) -> None:
    everything = gradient_graph(op_type, case, range(len(case.shapes)))
    feeds = drawn(everything, case, 5, np.float32)
    every = session(everything).run([f"grad.{i}" for i in range(len(case.shapes))], feeds)
    for count in range(1, len(case.shapes)):
        for wanted in itertools.combinations(range(len(case.shapes)), count):
            model = gradient_graph(op_type, case, wanted)
            assert len(list(model.graph)) <= len(list(everything.graph))
            found = session(model).run([f"grad.{i}" for i in wanted], feeds)
            for index, gradient in zip(wanted, found, strict=True):
                np.testing.assert_allclose(gradient, every[index], rtol=1e-6, atol=1e-6)


def gradient_graph(op_type: str, case: Case, wanted: Sequence[int]) -> ir.Model:
    """Inputs `in.<i>` and `weight.<k>`; outputs `loss` and `grad.<i>` for those wanted."""
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="rule"), ir_version=IR_VERSION)
    builder = Builder(model.graph)
    values = [builder.input(f"in.{index}", "float32", shape) for index, shape in enumerate(case.shapes)]
    outputs = builder.ops(case.outputs, op_type, *case.first, *values, *case.constants, **case.attributes)
    infer_shapes(model)
    loss = None
    for number, y in enumerate(value for value in outputs if value.dtype == ir.DataType.FLOAT):
        weight = builder.input(f"weight.{number}", "float32", dims(y))
        part = builder.op("ReduceSum", builder.op("Mul", y, builder.op("Add", weight, y)), keepdims=0)
        loss = part if loss is None else builder.op("Add", loss, part)
    assert loss is not None
    loss.name = "loss"
    infer_shapes(model)
    model.graph.outputs.append(loss)
    found = differentiate(builder, loss, [values[index] for index in wanted])
    for index in wanted:
        named = builder.op("Identity", found[values[index]], name=f"grad.{index}")
        named.shape, named.type = values[index].shape, values[index].type
        model.graph.outputs.append(named)
    tidy(model)
    return model


def drawn(model: ir.Model, case: Case, batch: int, dtype: type) -> dict[str, np.ndarray]:
    """Values of the inputs: multiples of 2^-10, no two of an input equal, away from kinks and from divisors near zero."""
    draw = np.random.default_rng(3)
    feeds = {}
    for value in model.graph.inputs:
        shape = [size if isinstance(size, int) else sized(str(size.value), batch) for size in value.shape]
        array = draw.normal(size=shape)
        array = np.where(np.abs(array) < 0.05, array + 0.1, array) + 1e-4 * np.arange(array.size).reshape(shape)
        if case.positive and str(value.name).startswith("in."):
            array = np.abs(array) + 0.3
        feeds[str(value.name)] = np.asarray(array).astype(dtype)
    return feeds


def sized(symbol: str, batch: int) -> int:
    return int(eval(symbol, {"batch": batch}))


def directions(shape: tuple[int, ...], draw: np.random.Generator) -> list[np.ndarray]:
    """Every coordinate of a small array; of a large one 12 coordinates, and 4 directions in which all of it moves."""
    size = int(np.prod(shape))
    places = range(size) if size <= 30 else draw.choice(size, 12, replace=False)
    units = [np.eye(1, size, int(place)).reshape(shape) for place in places]
    return units if size <= 30 else [*units, *(draw.normal(size=shape) / np.sqrt(size) for _ in range(4))]


def slope(function, feeds, name, direction, step=1e-5) -> float:
    ahead, behind = (function({**feeds, name: feeds[name] + sign * step * direction}) for sign in (1, -1))
    return (ahead - behind) / (2 * step)


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)


# What has no derivative, and what only a mark gives one.


@pytest.mark.parametrize("per_channel", [False, True])
def test_quantization_passes_the_gradient_where_it_did_not_saturate(per_channel: bool) -> None:
    scale, zero = (
        (floats(0.02, 0.03, 0.01), np.array([3, 0, -5], np.int8)) if per_channel else (np.float32(0.02), np.int8(3))
    )
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="rule"), ir_version=IR_VERSION)
    b = Builder(model.graph)
    x = b.input("x", "float32", X)
    codes = b.op("QuantizeLinear", x, b.const(scale), b.const(zero), axis=1)
    y = b.op("DequantizeLinear", codes, b.const(scale), b.const(zero), axis=1)
    loss = b.op("ReduceSum", b.op("Mul", y, y), keepdims=0, name="loss")
    infer_shapes(model)
    model.graph.outputs.append(b.op("Identity", differentiate(b, loss, [x])[x], name="grad"))
    tidy(model)
    value = np.random.default_rng(0).normal(0, 2, (5, 3, 8)).astype(np.float32)
    leaf = torch.tensor(value, requires_grad=True)
    if per_channel:
        fake = torch.fake_quantize_per_channel_affine(leaf, torch.tensor(scale), torch.tensor(zero).int(), 1, -128, 127)
    else:
        fake = torch.fake_quantize_per_tensor_affine(leaf, 0.02, 3, -128, 127)
    (expected,) = torch.autograd.grad((fake**2).sum(), leaf)
    found = session(model).run(["grad"], {"x": value})[0]
    assert 0 < (found == 0).sum() < found.size
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)


def test_a_marked_round_passes_the_gradient() -> None:
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="rule"), ir_version=IR_VERSION)
    b = Builder(model.graph)
    x = b.input("x", "float32", X)
    y = b.op("Round", b.op("Mul", x, 4.0))
    producer = y.producer()
    assert producer is not None
    producer.metadata_props[STRAIGHT_THROUGH] = "1"
    loss = b.op("ReduceSum", b.op("Mul", y, y), keepdims=0)
    infer_shapes(model)
    model.graph.outputs.append(b.op("Identity", differentiate(b, loss, [x])[x], name="grad"))
    tidy(model)
    value = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    np.testing.assert_allclose(session(model).run(["grad"], {"x": value})[0], 8 * np.round(4 * value), rtol=1e-6)


def test_ties_share_the_gradient_of_a_maximum() -> None:
    model = gradient_graph("ReduceMax", Case([X], [ints(-1)], {"keepdims": 0}), [0])
    x = np.zeros((2, 3, 8), np.float32)
    x[..., :4] = 1
    weight = np.ones((2, 3), np.float32)
    found = session(model).run(["grad.0"], {"in.0": x, "weight.0": weight})[0]
    np.testing.assert_allclose(found, np.where(x == 1, 3 / 4, 0))


def test_a_norm_of_zero_has_gradient_zero() -> None:
    model = gradient_graph("ReduceL2", Case([X], [ints(-1)], {"keepdims": 0}), [0])
    found = session(model).run(
        ["grad.0"], {"in.0": np.zeros((2, 3, 8), np.float32), "weight.0": np.ones((2, 3), np.float32)}
    )
    assert (found[0] == 0).all()


def test_a_part_that_nothing_reads_gets_zeros() -> None:
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="rule"), ir_version=IR_VERSION)
    b = Builder(model.graph)
    x = b.input("x", "float32", X)
    first, _ = b.ops(2, "Split", x, ints(3, 5), axis=2)
    loss = b.op("ReduceSum", first, keepdims=0)
    infer_shapes(model)
    model.graph.outputs.append(b.op("Identity", differentiate(b, loss, [x])[x], name="grad"))
    tidy(model)
    found = session(model).run(["grad"], {"x": np.ones((2, 3, 8), np.float32)})[0]
    assert found[0, 0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


def test_a_value_used_twice_gets_the_sum() -> None:
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="rule"), ir_version=IR_VERSION)
    b = Builder(model.graph)
    x = b.input("x", "float32", X)
    loss = b.op("ReduceSum", b.op("Add", x, x), keepdims=0)
    infer_shapes(model)
    model.graph.outputs.append(b.op("Identity", differentiate(b, loss, [x])[x], name="grad"))
    tidy(model)
    assert (session(model).run(["grad"], {"x": np.ones((2, 3, 8), np.float32)})[0] == 2).all()
