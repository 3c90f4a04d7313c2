"""Every rule of the differentiation pass, against central differences in float64."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from export.errors import NoGradientRule, NotDifferentiable, UnknownShape
from export.gradients import differentiate, rules
from export.graph import BATCH, IR_VERSION, OPSET, Builder, infer_shapes, tidy
from export.proof import to_double

X, W = (BATCH, 3, 8), (BATCH, 2, 6, 6)

# operator -> cases: (shapes of the inputs to differentiate, constants behind them, attributes)
CASES = {
    "Add": [([X, X], [], {}), ([X, (3, 1)], [], {}), ([(8,), X], [], {})],
    "Sub": [([X, X], [], {}), ([X, (3, 1)], [], {})],
    "Mul": [([X, X], [], {}), ([X, (1, 3, 1)], [], {})],
    "Div": [([X, (3, 1)], [], {}), ([(3, 1), X], [], {})],
    "Neg": [([X], [], {})],
    "Relu": [([X], [], {})],
    "Clip": [([X], [np.float32(-0.5), np.float32(0.7)], {}), ([X], [None, np.float32(0.4)], {})],
    "Sigmoid": [([X], [], {})],
    "Tanh": [([X], [], {})],
    "LogSoftmax": [([X], [], {"axis": -1}), ([X], [], {"axis": 1})],
    "ReduceSum": [
        ([X], [np.array([1])], {"keepdims": 0}),
        ([X], [np.array([0, 2])], {"keepdims": 1}),
        ([X], [], {"keepdims": 0}),
    ],
    "ReduceMean": [([X], [np.array([-1])], {"keepdims": 1}), ([X], [np.array([0, 1])], {"keepdims": 0})],
    "MatMul": [([X, (8, 5)], [], {}), ([X, (1, 8, 5)], [], {}), ([(5, 3), X], [], {})],
    "Gemm": [
        ([(BATCH, 5), (5, 4), (4,)], [], {}),
        ([(BATCH, 5), (4, 5), (1,)], [], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
        ([(5, BATCH), (5, 4)], [], {"transA": 1}),
        ([(5, BATCH), (4, 5)], [], {"transA": 1, "transB": 1}),
    ],
    "Conv": [
        ([X, (4, 3, 3), (4,)], [], {"pads": [1, 1]}),
        ([X, (4, 3, 3)], [], {"strides": [2]}),
        ([X, (4, 3, 2)], [], {"strides": [3], "pads": [1, 0]}),
        ([X, (4, 3, 3)], [], {"dilations": [2], "pads": [2, 2]}),
        ([X, (4, 3, 1)], [], {}),
        ([X, (4, 3, 2)], [], {"pads": [3, 3]}),
        ([W, (4, 2, 3, 3), (4,)], [], {"pads": [1, 1, 1, 1], "strides": [2, 1]}),
        ([W, (4, 1, 3, 3), (4,)], [], {"group": 2}),
        ([W, (2, 1, 3, 2)], [], {"group": 2, "strides": [2, 2]}),
    ],
    "BatchNormalization": [([W, (2,), (2,)], [np.float32([0.3, -0.2]), np.float32([0.8, 1.7])], {"epsilon": 1e-3})],
    "MaxPool": [
        ([X], [], {"kernel_shape": [2], "strides": [2]}),
        ([X], [], {"kernel_shape": [3], "strides": [3]}),
        ([X], [], {"kernel_shape": [3], "strides": [2], "pads": [1, 1]}),
        ([W], [], {"kernel_shape": [2, 3], "strides": [2, 3]}),
        ([W], [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ],
    "AveragePool": [
        ([X], [], {"kernel_shape": [2], "strides": [2]}),
        ([X], [], {"kernel_shape": [3], "strides": [2], "pads": [1, 1]}),
        ([W], [], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 0], "count_include_pad": 1}),
    ],
    "GlobalAveragePool": [([W], [], {})],
    "Reshape": [([X], [np.array([-1, 4, 6])], {}), ([X], [np.array([0, -1])], {})],
    "Flatten": [([X], [], {"axis": 1})],
    "Squeeze": [([(BATCH, 1, 4)], [np.array([1])], {})],
    "Unsqueeze": [([X], [np.array([1])], {})],
    "Transpose": [([X], [], {"perm": [2, 0, 1]}), ([X], [], {})],
    "Identity": [([X], [], {})],
}
ALL = [pytest.param(op, case, id=f"{op}-{number}") for op, cases in CASES.items() for number, case in enumerate(cases)]


def test_every_rule_has_cases_and_every_case_a_rule() -> None:
    assert set(CASES) == set(rules())


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("op_type", "case"), ALL)
def test_gradient_equals_central_differences(op_type: str, case: tuple, batch: int) -> None:
    shapes, constants, attributes = case
    check(op_type, shapes, constants, attributes, batch, wanted=range(len(shapes)))


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_what_is_wanted_is_made(wanted: int) -> None:
    check("Conv", [X, (4, 3, 3), (4,)], [], {"pads": [1, 1]}, 5, wanted=[wanted])
    check("Gemm", [(BATCH, 5), (5, 4), (4,)], [], {}, 5, wanted=[wanted])
    check("BatchNormalization", *CASES["BatchNormalization"][0], 5, wanted=[wanted])


def check(op_type, shapes, constants, attributes, batch, wanted) -> None:
    model, builder, values, result = graph(op_type, shapes, constants, attributes)
    found = differentiate(builder, result, [values[index] for index in wanted])
    for index, value in found_by(values, found):
        named = builder.op("Identity", value, name=f"grad.{index}")
        model.graph.outputs.append(named)
    tidy(model)
    evaluator = ReferenceEvaluator(to_double(ir.to_proto(model)))
    draw = np.random.default_rng(3)
    feeds = {f"in.{i}": draw.normal(size=[batch if s == BATCH else s for s in shape]) for i, shape in enumerate(shapes)}
    # Away from kinks and from divisors near zero.
    feeds = {name: np.where(np.abs(value) < 0.05, 0.3, value) for name, value in feeds.items()}
    for index in wanted:
        gradient = evaluator.run([f"grad.{index}"], feeds)[0]
        expected = differences(lambda values: float(evaluator.run(["loss"], values)[0]), feeds, f"in.{index}")
        assert gradient.shape == expected.shape
        assert np.abs(gradient - expected).max() <= 1e-6 * max(1.0, np.abs(expected).max())


def graph(op_type, shapes, constants, attributes):
    """The operator on inputs `in.<i>`, its outputs squared and summed to `loss`."""
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="rule"), ir_version=IR_VERSION)
    builder = Builder(model.graph)
    values = [builder.input(f"in.{index}", "float32", shape) for index, shape in enumerate(shapes)]
    y = builder.op(op_type, *values, *constants, **attributes)
    # Squared, so that every element has a gradient of its own.
    loss = builder.op("ReduceSum", builder.op("Mul", y, y), keepdims=0, name="loss")
    model.graph.outputs.append(loss)
    loss.shape, loss.type = ir.Shape(()), ir.TensorType(ir.DataType.FLOAT)
    tidy(model)
    infer_shapes(model)
    return model, builder, values, loss


def found_by(values, found):
    return [(index, found[value]) for index, value in enumerate(values) if value in found]


def differences(function, feeds, name, step=1e-6):
    result = np.zeros(feeds[name].shape)
    for place in np.ndindex(*result.shape):
        sides = []
        for sign in (1, -1):
            moved = feeds[name].copy()
            moved[place] += sign * step
            sides.append(function({**feeds, name: moved}))
        result[place] = (sides[0] - sides[1]) / (2 * step)
    return result


def test_a_value_used_twice_gets_the_sum() -> None:
    model, builder, values, _ = graph("Mul", [X, X], [], {})
    x = values[0]
    loss = builder.op("ReduceSum", builder.op("Add", x, x), keepdims=0)
    infer_shapes(model)
    model.graph.outputs[:] = [builder.op("Identity", differentiate(builder, loss, [x])[x], name="grad")]
    tidy(model)
    feeds = {"in.0": np.ones((2, 3, 8), np.float32)}
    assert (ReferenceEvaluator(ir.to_proto(model)).run(["grad"], {**feeds, "in.1": feeds["in.0"]})[0] == 2).all()


def test_all_operators_without_a_rule_are_named_with_their_path() -> None:
    model, builder, values, _ = graph("Identity", [X], [], {})
    builder.scope = "odd"
    y = builder.op("Erf", builder.op("Sin", values[0]))
    loss = builder.op("ReduceSum", y, keepdims=0)
    infer_shapes(model)
    with pytest.raises(NoGradientRule) as caught:
        differentiate(builder, loss, [values[0]])
    assert len(caught.value.findings) == 2
    assert "in.0 -> Sin -> Erf -> ReduceSum -> loss" in str(caught.value)


@pytest.mark.parametrize(
    ("op_type", "shapes", "attributes", "named"),
    [
        ("Conv", [X, (4, 3, 3)], {"auto_pad": "SAME_UPPER"}, "auto_pad"),
        ("MaxPool", [X], {"kernel_shape": [2], "dilations": [2]}, "dilations"),
        ("AveragePool", [X], {"kernel_shape": [2], "strides": [2], "ceil_mode": 1}, "ceil_mode"),
    ],
)
def test_an_attribute_without_a_rule_is_named(op_type, shapes, attributes, named) -> None:
    _, builder, values, loss = graph(op_type, shapes, [], attributes)
    with pytest.raises(NoGradientRule, match=named):
        differentiate(builder, loss, values)


def test_a_trainable_that_reaches_nothing_is_an_error() -> None:
    _, builder, values, _ = graph("Add", [X, X], [], {})
    loss = builder.op("ReduceSum", builder.op("Cast", builder.op("ArgMax", values[0]), to=1), keepdims=0)
    with pytest.raises(NotDifferentiable, match=r"in\.0"):
        differentiate(builder, loss, [values[0]])


def test_an_axis_that_may_repeat_or_not_is_an_error() -> None:
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="rule"), ir_version=IR_VERSION)
    builder = Builder(model.graph)
    a, c = builder.input("a", "float32", (BATCH, 3)), builder.input("c", "float32", ("other", 3))
    y = builder.op("Add", a, c)
    y.shape, y.type = ir.Shape((BATCH, 3)), ir.TensorType(ir.DataType.FLOAT)
    loss = builder.op("ReduceSum", y, keepdims=0)
    with pytest.raises(UnknownShape, match="other"):
        differentiate(builder, loss, [c])
