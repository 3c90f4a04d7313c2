"""Gradients of normalizations."""

from __future__ import annotations

import onnx_ir as ir

from export.gradients import Gradients, UnsupportedAttribute, Wanted, gradient, unbroadcast
from export.graph import Builder, attribute, dims, given


@gradient("LayerNormalization")
def _layer_normalization(b: Builder, node: ir.Node, dy: ir.Value, wanted: Wanted) -> Gradients:
    """y = gamma * x_hat + beta, x_hat = (x - mean) / sigma over the last axes; with d = dy * gamma:

        dx = (d - mean(d) - x_hat * mean(d * x_hat)) / sigma      dgamma = sum(dy * x_hat)      dbeta = sum(dy)

    mean and 1 / sigma are the operator's optional outputs (Ba et al., arXiv 1607.06450).
    """
    x, gamma = given(node, 0), given(node, 1)
    came = dims(node.outputs[0])
    axis = attribute(node, "axis", -1) % len(came)
    axes = b.ints(*range(axis, len(came)))
    mean, inverse = _statistics(node, axis)
    dx = dgamma = dbeta = None
    x_hat = b.op("Mul", b.op("Sub", x, mean), inverse) if wanted[0] or wanted[1] else x
    if wanted[0]:
        d = b.op("Mul", dy, gamma)
        along = b.op("Mul", x_hat, b.op("ReduceMean", b.op("Mul", d, x_hat), axes, keepdims=1))
        centred = b.op("Sub", d, b.op("ReduceMean", d, axes, keepdims=1))
        dx = b.op("Mul", b.op("Sub", centred, along), inverse)
    if wanted[1]:
        dgamma = unbroadcast(b, b.op("Mul", dy, x_hat), came, gamma)
    if len(wanted) > 2 and wanted[2]:
        dbeta = unbroadcast(b, dy, came, given(node, 2))
    return dx, dgamma, dbeta


def _statistics(node: ir.Node, axis: int) -> tuple[ir.Value, ir.Value]:
    """The second and third output, which forward graphs leave out."""
    y = node.outputs[0]
    if len(node.outputs) < 3:
        node.resize_outputs(3)
    for output, suffix in zip(node.outputs[1:], ("mean", "inverse_deviation"), strict=True):
        if not output.name:
            output.name = f"{y.name}/{suffix}"
        sizes = dims(y)
        output.shape = ir.Shape([*sizes[:axis], *[1] * (len(sizes) - axis)])
        output.type = ir.TensorType(ir.DataType.FLOAT)
    return node.outputs[1], node.outputs[2]


@gradient("BatchNormalization")
def _batch_normalization(b: Builder, node: ir.Node, dy: ir.Value, wanted: Wanted) -> Gradients:
    """Inference form, an affine map with constants: dy * gamma / sigma; sum(dy * x_hat); sum(dy).

    The training form is taken apart before (`export/decompose.py`).
    """
    if any(wanted[3:]):
        raise UnsupportedAttribute("trained statistics")
    x, gamma, mean = given(node, 0), given(node, 1), given(node, 3)
    rank = len(dims(x))
    column, others = b.ints(-1, *[1] * (rank - 2)), b.ints(0, *range(2, rank))
    inverse = inverse_deviation(b, node)
    dx = dgamma = dbeta = None
    if wanted[0]:
        dx = b.op("Mul", dy, b.op("Reshape", b.op("Mul", gamma, inverse), column))
    if wanted[1]:
        centred = b.op("Sub", x, b.op("Reshape", mean, column))
        dgamma = b.op("Mul", b.op("ReduceSum", b.op("Mul", dy, centred), others, keepdims=0), inverse)
    if wanted[2]:
        dbeta = b.op("ReduceSum", dy, others, keepdims=0)
    return dx, dgamma, dbeta, None, None


def inverse_deviation(b: Builder, norm: ir.Node) -> ir.Value:
    """1 / sqrt(variance + epsilon) `[channels]` of a BatchNormalization's running variance."""
    spread = b.op("Add", given(norm, 4), float(attribute(norm, "epsilon", 1e-5)))
    return b.op("Div", 1.0, b.op("Sqrt", spread))
