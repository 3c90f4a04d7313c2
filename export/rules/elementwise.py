"""Gradients of arithmetic and of activations: each element of the output follows from one element of each input."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from export.gradients import Gradients, UnsupportedAttribute, Wanted, gradient, unbroadcast
from export.graph import Builder, array_of, attribute, dims, given


def masked(b: Builder, condition: ir.Value, dy: ir.Value) -> ir.Value:
    """dy where the condition holds, else 0. A product: the runtime's Where takes far longer."""
    return b.op("Mul", dy, b.op("Cast", condition, to=ir.DataType.FLOAT.value))


@gradient("Add", "Sub")
def _add(b: Builder, node: ir.Node, dy: ir.Value, wanted: Wanted) -> Gradients:
    """y = a ± c: dy and ±dy."""
    came = dims(node.outputs[0])
    da = unbroadcast(b, dy, came, given(node, 0)) if wanted[0] else None
    dc = None
    if wanted[1]:
        dc = unbroadcast(b, dy, came, given(node, 1))
        dc = b.op("Neg", dc) if node.op_type == "Sub" else dc
    return da, dc


@gradient("Mul")
def _mul(b: Builder, node: ir.Node, dy: ir.Value, wanted: Wanted) -> Gradients:
    """y = a * c: dy * c and dy * a."""
    came = dims(node.outputs[0])
    first, second = given(node, 0), given(node, 1)
    return (
        unbroadcast(b, b.op("Mul", dy, second), came, first) if wanted[0] else None,
        unbroadcast(b, b.op("Mul", dy, first), came, second) if wanted[1] else None,
    )


@gradient("Div")
def _div(b: Builder, node: ir.Node, dy: ir.Value, wanted: Wanted) -> Gradients:
    """y = a / c: dy / c and -dy * y / c."""
    came = dims(node.outputs[0])
    first, second = given(node, 0), given(node, 1)
    over = b.op("Div", dy, second)
    return (
        unbroadcast(b, over, came, first) if wanted[0] else None,
        unbroadcast(b, b.op("Neg", b.op("Mul", over, node.outputs[0])), came, second) if wanted[1] else None,
    )


@gradient("Max", "Min")
def _max(b: Builder, node: ir.Node, dy: ir.Value, wanted: Wanted) -> Gradients:
    """y = max(a, c): dy where the input is the larger one, half of it where both are equal, as in torch."""
    if len(node.inputs) != 2:
        raise UnsupportedAttribute(f"{len(node.inputs)} operands")
    came = dims(node.outputs[0])
    wins = "Greater" if node.op_type == "Max" else "Less"

    def share(mine: ir.Value, other: ir.Value) -> ir.Value:
        tied = masked(b, b.op("Equal", mine, other), b.op("Mul", dy, 0.5))
        return unbroadcast(b, b.op("Add", masked(b, b.op(wins, mine, other), dy), tied), came, mine)

    first, second = given(node, 0), given(node, 1)
    return share(first, second) if wanted[0] else None, share(second, first) if wanted[1] else None


@gradient("Neg")
def _neg(b: Builder, _node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """y = -x: -dy."""
    return (b.op("Neg", dy),)


@gradient("Abs")
def _abs(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """dy * sign(x); 0 at the kink, as in torch."""
    return (b.op("Mul", dy, b.op("Sign", given(node, 0))),)


@gradient("Exp")
def _exp(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """dy * y."""
    return (b.op("Mul", dy, node.outputs[0]),)


@gradient("Log")
def _log(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """dy / x."""
    return (b.op("Div", dy, given(node, 0)),)


@gradient("Sqrt")
def _sqrt(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """dy / 2y."""
    return (b.op("Div", dy, b.op("Mul", node.outputs[0], 2.0)),)


@gradient("Reciprocal")
def _reciprocal(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """-dy * y^2."""
    y = node.outputs[0]
    return (b.op("Neg", b.op("Mul", dy, b.op("Mul", y, y))),)


@gradient("Pow")
def _pow(b: Builder, node: ir.Node, dy: ir.Value, wanted: Wanted) -> Gradients:
    """y = x^c: dy * c * x^(c-1); the exponent does not train."""
    if wanted[1]:
        raise UnsupportedAttribute("a trained exponent")
    x, exponent = given(node, 0), given(node, 1)
    value = array_of(exponent)
    if value is None or value.dtype != np.float32:
        power: ir.Value = b.op("Cast", exponent, to=ir.DataType.FLOAT.value)
        slope = b.op("Mul", power, b.op("Pow", x, b.op("Sub", power, 1.0)))
    elif value.size == 1 and value.item() == 2:
        slope = b.op("Mul", x, 2.0)
    else:
        slope = b.op("Mul", b.op("Pow", x, b.const(value - np.float32(1))), b.const(value))
    return unbroadcast(b, b.op("Mul", dy, slope), dims(node.outputs[0]), x), None


@gradient("Relu")
def _relu(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """dy where y > 0; 0 at the kink, as in torch."""
    return (masked(b, b.op("Greater", node.outputs[0], 0.0), dy),)


@gradient("LeakyRelu")
def _leaky_relu(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """dy where x > 0, alpha * dy elsewhere."""
    alpha = float(attribute(node, "alpha", 0.01))
    positive = b.op("Cast", b.op("Greater", given(node, 0), 0.0), to=ir.DataType.FLOAT.value)
    return (b.op("Mul", dy, b.op("Add", b.op("Mul", positive, 1 - alpha), alpha)),)


@gradient("Clip")
def _clip(b: Builder, node: ir.Node, dy: ir.Value, wanted: Wanted) -> Gradients:
    """dy where min <= x <= max, both ends included, as torch's clamp."""
    if any(wanted[1:]):
        raise UnsupportedAttribute("a trained bound")
    x = given(node, 0)
    for bound, compare in zip(node.inputs[1:], ("GreaterOrEqual", "LessOrEqual"), strict=False):
        if bound is not None:
            dy = masked(b, b.op(compare, x, bound), dy)
    return dy, None, None


@gradient("Sigmoid")
def _sigmoid(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """dy * y * (1 - y)."""
    y = node.outputs[0]
    return (b.op("Mul", dy, b.op("Mul", y, b.op("Sub", 1.0, y))),)


@gradient("HardSigmoid")
def _hard_sigmoid(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """y = min(1, max(0, alpha x + beta)): alpha * dy where 0 < y < 1."""
    y = node.outputs[0]
    inside = b.op("And", b.op("Greater", y, 0.0), b.op("Less", y, 1.0))
    return (masked(b, inside, b.op("Mul", dy, float(attribute(node, "alpha", 0.2)))),)


@gradient("HardSwish")
def _hard_swish(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """y = x * min(1, max(0, x / 6 + 1 / 2)): dy times 0 below -3, 1 from 3 on, x / 3 + 1 / 2 between."""
    x = given(node, 0)
    low = b.op("Greater", x, -3.0)
    slope = b.op("Min", b.op("Add", b.op("Mul", x, 1 / 3), 0.5), 1.5)
    high = b.op("Cast", b.op("Less", x, 3.0), to=ir.DataType.FLOAT.value)
    # 1 + high * (slope - 1) is the slope below 3 and 1 from there on
    return (masked(b, low, b.op("Mul", dy, b.op("Add", b.op("Mul", high, b.op("Sub", slope, 1.0)), 1.0))),)


@gradient("Tanh")
def _tanh(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """dy * (1 - y^2)."""
    y = node.outputs[0]
    return (b.op("Mul", dy, b.op("Sub", 1.0, b.op("Mul", y, y))),)


@gradient("Erf")
def _erf(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """dy * 2 / sqrt(pi) * exp(-x^2)."""
    x = given(node, 0)
    return (b.op("Mul", dy, b.op("Mul", b.op("Exp", b.op("Neg", b.op("Mul", x, x))), 2 / math.sqrt(math.pi))),)


@gradient("Gelu")
def _gelu(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """y = x * P(x), P the normal distribution: dy * (P(x) + x * P'(x)); in the tanh form P(x) = (1 + t) / 2,
    t = tanh(k (x + c x^3)), k = sqrt(2 / pi), c = 0.044715."""
    x = given(node, 0)
    square = b.op("Mul", x, x)
    if attribute(node, "approximate", "none") == "tanh":
        k, c = math.sqrt(2 / math.pi), 0.044715
        t = b.op("Tanh", b.op("Mul", x, b.op("Add", b.op("Mul", square, k * c), k)))
        inner = b.op("Add", b.op("Mul", square, 1.5 * k * c), 0.5 * k)
        density = b.op("Mul", b.op("Sub", 1.0, b.op("Mul", t, t)), inner)
    else:
        t = b.op("Erf", b.op("Mul", x, math.sqrt(0.5)))
        density = b.op("Mul", b.op("Exp", b.op("Mul", square, -0.5)), 1 / math.sqrt(2 * math.pi))
    distribution = b.op("Add", b.op("Mul", t, 0.5), 0.5)
    return (b.op("Mul", dy, b.op("Add", distribution, b.op("Mul", x, density))),)


@gradient("Softplus")
def _softplus(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """y = log(1 + exp(x)): dy * sigmoid(x)."""
    return (b.op("Mul", dy, b.op("Sigmoid", given(node, 0))),)


@gradient("Where")
def _where(b: Builder, node: ir.Node, dy: ir.Value, wanted: Wanted) -> Gradients:
    """y = a where c, else d: dy where c, else 0; 0 where c, else dy."""
    came, condition = dims(node.outputs[0]), given(node, 0)
    return (
        None,
        unbroadcast(b, masked(b, condition, dy), came, given(node, 1)) if wanted[1] else None,
        unbroadcast(b, masked(b, b.op("Not", condition), dy), came, given(node, 2)) if wanted[2] else None,
    )


@gradient("Cast")
def _cast(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """dy in the type of the input; both are floating-point."""
    source = given(node, 0).dtype
    assert source is not None
    return (dy if source == node.outputs[0].dtype else b.op("Cast", dy, to=source.value),)
