"""Gradients of convolutions (Dumoulin and Visin, arXiv 1603.07285, chapter 4)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import onnx_ir as ir

from export.gradients import Gradients, UnsupportedAttribute, Wanted, gradient
from export.graph import Builder, attribute, given, static
from export.rules.windows import Window, window_of


@gradient("Conv")
def _conv(b: Builder, node: ir.Node, dy: ir.Value, wanted: Wanted) -> Gradients:
    """Input: a convolution of dy with the flipped kernel, or its transpose; weight: `weight_gradient`; bias: sum(dy)."""
    x, w = given(node, 0), given(node, 1)
    window, group = window_of(node, static(w)[2:]), attribute(node, "group", 1)
    outs = static(node.outputs[0], 2)
    dx = _input_gradient(b, x, w, dy, window, group) if wanted[0] else None
    dw = weight_gradient(b, x, dy, static(w), static(x, 2), outs, window, group) if wanted[1] else None
    return dx, dw, _bias_gradient(b, dy, window) if len(wanted) > 2 and wanted[2] else None


@gradient("ConvTranspose")
def _conv_transpose(b: Builder, node: ir.Node, dy: ir.Value, wanted: Wanted) -> Gradients:
    """It is the input gradient of a convolution from y to x, so that convolution of dy is its own; weight: the roles of
    x and dy exchanged; bias: sum(dy)."""
    x, w = given(node, 0), given(node, 1)
    if attribute(node, "output_shape") is not None:
        raise UnsupportedAttribute("output_shape")
    window, group = window_of(node, static(w)[2:]), attribute(node, "group", 1)
    dx = dw = None
    if wanted[0]:
        dx = b.op(
            "Conv",
            dy,
            w,
            strides=list(window.strides),
            pads=list(window.pads),
            dilations=list(window.dilations),
            group=group,
        )
    if wanted[1]:
        dw = weight_gradient(b, dy, x, static(w), static(node.outputs[0], 2), static(x, 2), window, group)
    return dx, dw, _bias_gradient(b, dy, window) if len(wanted) > 2 and wanted[2] else None


def _bias_gradient(b: Builder, dy: ir.Value, window: Window) -> ir.Value:
    return b.op("ReduceSum", dy, b.ints(0, *range(2, window.rank + 2)), keepdims=0)


def _input_gradient(b: Builder, x: ir.Value, w: ir.Value, dy: ir.Value, window: Window, group: int) -> ir.Value:
    rank = window.rank
    mirrored = [reach - pad for reach, pad in zip(window.reach * 2, window.pads, strict=True)]
    if all(stride == 1 for stride in window.strides) and min(mirrored) >= 0:
        # The runtime's Conv is faster than its ConvTranspose.
        out, inner = static(w)[:2]
        kernel = w
        if group != out or inner != 1:
            split = b.op("Reshape", w, b.ints(group, out // group, inner, *window.kernel)) if group > 1 else w
            if group > 1:
                turned = b.op("Transpose", split, perm=[0, 2, 1, *range(3, 3 + rank)])
                kernel = b.op("Reshape", turned, b.ints(group * inner, out // group, *window.kernel))
            else:
                kernel = b.op("Transpose", split, perm=[1, 0, *range(2, 2 + rank)])
        if any(size > 1 for size in window.kernel):
            back, far, axes = b.ints(*[-1] * rank), b.ints(*[-(2**31)] * rank), b.ints(*range(2, 2 + rank))
            kernel = b.op("Slice", kernel, back, far, axes, back)
        return b.op("Conv", dy, kernel, pads=mirrored, dilations=list(window.dilations), group=group)
    sizes = static(x, 2)
    outs = [
        (size + begin + end - reach - 1) // stride + 1
        for size, begin, end, reach, stride in zip(
            sizes, window.begins, window.ends, window.reach, window.strides, strict=True
        )
    ]
    return b.op(
        "ConvTranspose",
        dy,
        w,
        strides=list(window.strides),
        pads=list(window.pads),
        dilations=list(window.dilations),
        output_padding=window.output_padding(sizes, outs),
        group=group,
    )


def weight_gradient(
    b: Builder,
    x: ir.Value,
    dy: ir.Value,
    shape: tuple[int, ...],
    sizes: Sequence[int],
    outs: Sequence[int],
    window: Window,
    group: int,
) -> ir.Value:
    """dW[o, c, t] = sum over n, l of dy[n, o, l] * x_padded[n, c, stride l + dilation t]: one product per kernel tap.

    The batch is turned to the innermost axis once, so that the strided slice of each tap copies runs of many samples. Few
    input channels are joined over the taps: one product of `[out, n l]` and `[n l, taps channels]` is then the faster one.
    """
    out, inner = shape[:2]
    rank = window.rank
    axes = list(range(1, rank + 1))
    channels, errors = _batch_last(b, x, inner * group, sizes), _batch_last(b, dy, out, outs)
    if any(window.pads):
        channels = b.op("Pad", channels, b.ints(0, *window.begins, 0, 0, *window.ends, 0))
    taps = []
    for tap in itertools.product(*(range(size) for size in window.kernel)):
        starts = [d * t for d, t in zip(window.dilations, tap, strict=True)]
        stops = [s + stride * (n - 1) + 1 for s, stride, n in zip(starts, window.strides, outs, strict=True)]
        seen = b.op("Slice", channels, b.ints(*starts), b.ints(*stops), b.ints(*axes), b.ints(*window.strides))
        taps.append(b.op("Reshape", seen, b.ints(inner * group, -1)))
    if group == 1 and inner <= _FEW_CHANNELS:
        joined = taps[0] if len(taps) == 1 else b.op("Concat", *taps, axis=0)
        product = b.op("Gemm", b.op("Reshape", errors, b.ints(out, -1)), joined, transB=1)
        apart = b.op("Reshape", product, b.ints(out, *window.kernel, inner))
        return b.op("Transpose", apart, perm=[0, rank + 1, *range(1, rank + 1)])
    each = [b.op("Reshape", part, b.ints(out, inner, 1)) for part in _products(b, errors, taps, out, inner, group)]
    joined = each[0] if len(each) == 1 else b.op("Concat", *each, axis=2)
    return b.op("Reshape", joined, b.ints(*shape))


_FEW_CHANNELS = 8


def _batch_last(b: Builder, value: ir.Value, channels: int, sizes: Sequence[int]) -> ir.Value:
    """`[n, channels, *sizes]` to `[channels, *sizes, n]`.

    Through three axes: the runtime would join a turn of all axes with one before it, to one that it does element by element.
    """
    flat = b.op("Reshape", value, b.ints(-1, channels, math.prod(sizes)))
    return b.op("Reshape", b.op("Transpose", flat, perm=[1, 2, 0]), b.ints(channels, *sizes, -1))


def _products(
    b: Builder, errors: ir.Value, taps: Sequence[ir.Value], out: int, inner: int, group: int
) -> list[ir.Value]:
    """For each tap `[channels, n l]` the product with the errors `[out, n l]`, within each group."""
    if group == 1:
        flat = b.op("Reshape", errors, b.ints(out, -1))
        return [b.op("Gemm", flat, tap, transB=1) for tap in taps]
    if inner == 1 and out == group:
        flat = b.op("Reshape", errors, b.ints(out, -1))
        return [b.op("ReduceSum", b.op("Mul", flat, tap), b.ints(1), keepdims=1) for tap in taps]
    flat = b.op("Reshape", errors, b.ints(group, out // group, -1))
    turned = [b.op("Transpose", b.op("Reshape", tap, b.ints(group, inner, -1)), perm=[0, 2, 1]) for tap in taps]
    return [b.op("MatMul", flat, tap) for tap in turned]
