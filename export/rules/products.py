"""Gradients of matrix products."""

from __future__ import annotations

import onnx_ir as ir

from export.gradients import Gradients, UnsupportedAttribute, Wanted, gradient, unbroadcast
from export.graph import Builder, attribute, dims, given, static


@gradient("MatMul")
def _matmul(b: Builder, node: ir.Node, dy: ir.Value, wanted: Wanted) -> Gradients:
    """y = a c: dy c^T and a^T dy; a matrix `c` under batches of `a` takes one product over all rows."""
    first, second = given(node, 0), given(node, 1)
    left, right = dims(first), dims(second)
    if len(left) < 2 or len(right) < 2:
        raise UnsupportedAttribute("a vector as operand")
    came = dims(node.outputs[0])
    da = dc = None
    if wanted[0]:
        da = unbroadcast(b, b.op("MatMul", dy, swapped(b, second)), (*came[:-1], left[-1]), first)
    if wanted[1] and len(right) == 2:
        rows, errors = first, dy
        if len(left) > 2:
            inner, outer = static(second)
            rows, errors = b.op("Reshape", first, b.ints(-1, inner)), b.op("Reshape", dy, b.ints(-1, outer))
        dc = b.op("Gemm", rows, errors, transA=1)
    elif wanted[1]:
        dc = unbroadcast(b, b.op("MatMul", swapped(b, first), dy), (*came[:-2], right[-2], right[-1]), second)
    return da, dc


def swapped(b: Builder, value: ir.Value) -> ir.Value:
    """The last two axes exchanged; what was exchanged just before is taken from there."""
    rank = len(dims(value))
    perm = [*range(rank - 2), rank - 1, rank - 2]
    maker = value.producer()
    if maker is not None and maker.op_type == "Transpose" and list(attribute(maker, "perm", ())) == perm:
        return given(maker, 0)
    return b.op("Transpose", value, perm=perm)


@gradient("Gemm")
def _gemm(b: Builder, node: ir.Node, dy: ir.Value, wanted: Wanted) -> Gradients:
    """y = alpha A' B' + beta C: alpha dy B'^T, alpha A'^T dy, beta dy; transpositions stay attributes."""
    first, second = given(node, 0), given(node, 1)
    alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
    trans_a, trans_b = attribute(node, "transA", 0), attribute(node, "transB", 0)
    da = db = dc = None
    if wanted[0] and trans_a:
        da = b.op("Gemm", second, dy, transA=trans_b, transB=1, alpha=alpha)
    elif wanted[0]:
        da = b.op("Gemm", dy, second, transB=1 - trans_b, alpha=alpha)
    if wanted[1] and trans_b:
        db = b.op("Gemm", dy, first, transA=1, transB=trans_a, alpha=alpha)
    elif wanted[1]:
        db = b.op("Gemm", first, dy, transA=1 - trans_a, alpha=alpha)
    if len(wanted) > 2 and wanted[2]:
        dc = unbroadcast(b, dy if beta == 1.0 else b.op("Mul", dy, float(beta)), dims(node.outputs[0]), given(node, 2))
    return da, db, dc
