"""One rule per operator: the gradient of its inputs from `dy`, the gradient of its output (step-graphs.md, 3.3).

Each rule is a function of the builder, the forward node, `dy` and which inputs are wanted, and returns one value or None
per input. `*` below is the element-wise product; `unbroadcast` sums over axes along which an input was repeated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from export.gradients import Gradients, UnsupportedAttribute, gradient, unbroadcast
from export.graph import Builder, array_of, attribute, dims, static

Wanted = Sequence[bool]


def _inputs(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None]


def _like(b: Builder, dx: ir.Value, x: ir.Value) -> ir.Value:
    return b.op("Reshape", dx, b.op("Shape", x))


@gradient("Add", "Sub")
def _add(b: Builder, node: ir.Node, dy: ir.Value, wanted: Wanted) -> Gradients:
    """y = a ± c: dy and ±dy."""
    came = dims(node.outputs[0])
    first, second = _inputs(node)
    da = unbroadcast(b, dy, came, first) if wanted[0] else None
    dc = None
    if wanted[1]:
        dc = unbroadcast(b, b.op("Neg", dy) if node.op_type == "Sub" else dy, came, second)
    return da, dc


@gradient("Mul")
def _mul(b: Builder, node: ir.Node, dy: ir.Value, wanted: Wanted) -> Gradients:
    """y = a * c: dy * c and dy * a."""
    came = dims(node.outputs[0])
    first, second = _inputs(node)
    return (
        unbroadcast(b, b.op("Mul", dy, second), came, first) if wanted[0] else None,
        unbroadcast(b, b.op("Mul", dy, first), came, second) if wanted[1] else None,
    )


@gradient("Div")
def _div(b: Builder, node: ir.Node, dy: ir.Value, wanted: Wanted) -> Gradients:
    """y = a / c: dy / c and -dy * y / c."""
    came = dims(node.outputs[0])
    first, second = _inputs(node)
    over = b.op("Div", dy, second)
    return (
        unbroadcast(b, over, came, first) if wanted[0] else None,
        unbroadcast(b, b.op("Neg", b.op("Mul", over, node.outputs[0])), came, second) if wanted[1] else None,
    )


@gradient("Neg")
def _neg(b: Builder, _node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """y = -x: -dy."""
    return (b.op("Neg", dy),)


@gradient("Relu")
def _relu(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """dy where y > 0; 0 at the kink, as torch."""
    return (b.op("Where", b.op("Greater", node.outputs[0], 0.0), dy, 0.0),)


@gradient("Clip")
def _clip(b: Builder, node: ir.Node, dy: ir.Value, wanted: Wanted) -> Gradients:
    """dy where min <= x <= max, both ends included, as torch's clamp."""
    if any(wanted[1:]):
        raise UnsupportedAttribute("a trained bound")
    x = node.inputs[0]
    for bound, compare in zip(node.inputs[1:], ("GreaterOrEqual", "LessOrEqual"), strict=False):
        if bound is not None:
            dy = b.op("Where", b.op(compare, x, bound), dy, 0.0)
    return dy, None, None


@gradient("Sigmoid")
def _sigmoid(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """dy * y * (1 - y)."""
    y = node.outputs[0]
    return (b.op("Mul", dy, b.op("Mul", y, b.op("Sub", 1.0, y))),)


@gradient("Tanh")
def _tanh(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """dy * (1 - y^2)."""
    y = node.outputs[0]
    return (b.op("Mul", dy, b.op("Sub", 1.0, b.op("Mul", y, y))),)


@gradient("LogSoftmax")
def _log_softmax(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """dy - exp(y) * sum(dy) along the axis."""
    total = b.op("ReduceSum", dy, b.ints(attribute(node, "axis", -1)), keepdims=1)
    return (b.op("Sub", dy, b.op("Mul", b.op("Exp", node.outputs[0]), total)),)


@gradient("ReduceSum", "ReduceMean")
def _reduce(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """dy repeated along the reduced axes, divided by their count for the mean (counted in the graph where it is the batch)."""
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    sizes = dims(x)
    given = array_of(node.inputs[1]) if len(node.inputs) > 1 else None
    if given is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        raise UnsupportedAttribute("axes that are computed")
    if given is None or given.size == 0:
        if attribute(node, "noop_with_empty_axes", 0):
            return dy, None
        axes = list(range(len(sizes)))
    else:
        axes = [int(axis) % len(sizes) for axis in given]
    if not attribute(node, "keepdims", 1) and len(axes) < len(sizes):
        dy = b.op("Unsqueeze", dy, b.ints(*axes))
    if node.op_type == "ReduceMean":
        reduced = [sizes[axis] for axis in axes]
        if all(isinstance(size, int) for size in reduced):
            count: ir.Value | float = float(math.prod(int(size) for size in reduced))
        else:
            as_float = [b.op("Cast", b.op("Size", value), to=ir.DataType.FLOAT.value) for value in (x, y)]
            count = b.op("Div", *as_float)
        dy = b.op("Div", dy, count)
    return b.op("Expand", dy, b.op("Shape", x)), None


@gradient("MatMul")
def _matmul(b: Builder, node: ir.Node, dy: ir.Value, wanted: Wanted) -> Gradients:
    """y = a c: dy c^T and a^T dy; a matrix `c` under batches of `a` takes one product over all rows."""
    first, second = _inputs(node)
    da = dc = None
    left, right = dims(first), dims(second)
    if len(left) < 2 or len(right) < 2:
        raise UnsupportedAttribute("a vector as operand")
    came = dims(node.outputs[0])
    if wanted[0]:
        swapped = b.op("Transpose", second, perm=_swap(len(right)))
        da = unbroadcast(b, b.op("MatMul", dy, swapped), (*came[:-1], left[-1]), first)
    if wanted[1] and len(right) == 2:
        rows = b.op("Reshape", first, b.ints(-1, static(second)[0]))
        dc = b.op("Gemm", rows, b.op("Reshape", dy, b.ints(-1, static(second)[1])), transA=1)
    elif wanted[1]:
        swapped = b.op("Transpose", first, perm=_swap(len(left)))
        dc = unbroadcast(b, b.op("MatMul", swapped, dy), (*came[:-2], right[-2], right[-1]), second)
    return da, dc


def _swap(rank: int) -> list[int]:
    return [*range(rank - 2), rank - 1, rank - 2]


@gradient("Gemm")
def _gemm(b: Builder, node: ir.Node, dy: ir.Value, wanted: Wanted) -> Gradients:
    """y = alpha A' B' + beta C: alpha dy B'^T, alpha A'^T dy, beta dy; transpositions stay attributes."""
    first, second = _inputs(node)[:2]
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
        third = node.inputs[2]
        assert third is not None
        dc = unbroadcast(b, dy if beta == 1.0 else b.op("Mul", dy, float(beta)), dims(node.outputs[0]), third)
    return da, db, dc


@gradient("Conv")
def _conv(b: Builder, node: ir.Node, dy: ir.Value, wanted: Wanted) -> Gradients:
    """Input: a convolution with the flipped kernel, or its transpose; weight: section 3.5; bias: the sum over all but channels."""
    x, w = _inputs(node)[:2]
    rank = len(dims(w)) - 2
    if attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise UnsupportedAttribute(f"auto_pad = {attribute(node, 'auto_pad')}")
    geometry = _Window(
        kernel=static(w)[2:],
        strides=tuple(attribute(node, "strides", [1] * rank)),
        pads=tuple(attribute(node, "pads", [0] * 2 * rank)),
        dilations=tuple(attribute(node, "dilations", [1] * rank)),
    )
    group = attribute(node, "group", 1)
    dx = _conv_input(b, x, w, dy, geometry, group) if wanted[0] else None
    dw = _conv_weight(b, x, w, dy, static(node.outputs[0], 2), geometry, group) if wanted[1] else None
    db = None
    if len(wanted) > 2 and wanted[2]:
        db = b.op("ReduceSum", dy, b.ints(0, *range(2, rank + 2)), keepdims=0)
    return dx, dw, db


class _Window:
    """Kernel, strides, pads (all begins, then all ends) and dilations along the spatial axes."""

    def __init__(
        self, kernel: tuple[int, ...], strides: tuple[int, ...], pads: tuple[int, ...], dilations: tuple[int, ...]
    ) -> None:
        self.kernel, self.strides, self.pads, self.dilations = kernel, strides, pads, dilations
        self.rank = len(kernel)


def _conv_input(b: Builder, x: ir.Value, w: ir.Value, dy: ir.Value, window: _Window, group: int) -> ir.Value:
    rank = window.rank
    reach = [d * (k - 1) for d, k in zip(window.dilations, window.kernel, strict=True)]
    begins, ends = window.pads[:rank], window.pads[rank:]
    mirrored = [r - p for r, p in zip(reach * 2, (*begins, *ends), strict=True)]
    if all(stride == 1 for stride in window.strides) and min(mirrored) >= 0:
        # The runtime's Conv is faster than its ConvTranspose.
        out, inner = static(w)[:2]
        spatial = list(range(rank))
        split = b.op("Reshape", w, b.ints(group, out // group, inner, *window.kernel))
        swapped = b.op("Transpose", split, perm=[0, 2, 1, *(3 + axis for axis in spatial)])
        kernel = b.op("Reshape", swapped, b.ints(group * inner, out // group, *window.kernel))
        if any(size > 1 for size in window.kernel):
            far = [-(2**31)] * rank
            axes = [2 + axis for axis in spatial]
            kernel = b.op("Slice", kernel, b.ints(*[-1] * rank), b.ints(*far), b.ints(*axes), b.ints(*[-1] * rank))
        return b.op("Conv", dy, kernel, pads=mirrored, dilations=list(window.dilations), group=group)
    sizes, out_sizes = static(x, 2), static_spatial(x, window)
    extra = [
        size - (stride * (out - 1) + r + 1 - begin - end)
        for size, out, stride, r, begin, end in zip(sizes, out_sizes, window.strides, reach, begins, ends, strict=True)
    ]
    return b.op(
        "ConvTranspose",
        dy,
        w,
        strides=list(window.strides),
        pads=list(window.pads),
        dilations=list(window.dilations),
        output_padding=extra,
        group=group,
    )


def static_spatial(x: ir.Value, window: _Window) -> tuple[int, ...]:
    """The spatial sizes of what a window makes of `x` (rounded down)."""
    rank = window.rank
    return tuple(
        (size + window.pads[i] + window.pads[rank + i] - window.dilations[i] * (window.kernel[i] - 1) - 1)
        // window.strides[i]
        + 1
        for i, size in enumerate(static(x, 2))
    )


def _conv_weight(
    b: Builder, x: ir.Value, w: ir.Value, dy: ir.Value, out_sizes: tuple[int, ...], window: _Window, group: int
) -> ir.Value:
    """dW[o, c, t] = sum over n, l of dy[n, o, l] * x_padded[n, c, stride l + dilation t]: one product per kernel tap."""
    out, inner = static(w)[:2]
    rank = window.rank
    axes = list(range(2, rank + 2))
    if any(window.pads):
        begins, ends = window.pads[:rank], window.pads[rank:]
        x = b.op("Pad", x, b.ints(0, 0, *begins, 0, 0, *ends))
    first = [1, 0, *axes]
    channels, errors = b.op("Transpose", x, perm=first), b.op("Transpose", dy, perm=first)
    depthwise = inner == 1 and out == group
    if group == 1 or depthwise:
        errors = b.op("Reshape", errors, b.ints(out, -1))
    else:
        errors = b.op("Reshape", errors, b.ints(group, out // group, -1))
    taps = []
    for tap in itertools.product(*(range(size) for size in window.kernel)):
        starts = [d * t for d, t in zip(window.dilations, tap, strict=True)]
        stops = [s + stride * (n - 1) + 1 for s, stride, n in zip(starts, window.strides, out_sizes, strict=True)]
        seen = b.op("Slice", channels, b.ints(*starts), b.ints(*stops), b.ints(*axes), b.ints(*window.strides))
        if depthwise:
            flat = b.op("Reshape", seen, b.ints(out, -1))
            taps.append(b.op("ReduceSum", b.op("Mul", errors, flat), b.ints(1), keepdims=1))
        elif group == 1:
            flat = b.op("Reshape", seen, b.ints(inner, -1))
            taps.append(b.op("Gemm", errors, flat, transB=1))
        else:
            flat = b.op("Transpose", b.op("Reshape", seen, b.ints(group, inner, -1)), perm=[0, 2, 1])
            taps.append(b.op("MatMul", errors, flat))
    each = [b.op("Reshape", tap, b.ints(out, inner, 1)) for tap in taps]
    joined = each[0] if len(each) == 1 else b.op("Concat", *each, axis=2)
    return b.op("Reshape", joined, b.ints(out, inner, *window.kernel))


@gradient("BatchNormalization")
def _batch_normalization(b: Builder, node: ir.Node, dy: ir.Value, wanted: Wanted) -> Gradients:
    """Inference form, an affine map with constants: dy * gamma / sigma; sum(dy * x_hat); sum(dy)."""
    if attribute(node, "training_mode", 0) or any(wanted[3:]):
        raise UnsupportedAttribute("training_mode = 1 (its statistics are frozen here: export in evaluation mode)")
    x, gamma, _, mean, variance = _inputs(node)
    column = b.ints(-1, *[1] * (len(dims(x)) - 2))
    inverse = b.op("Div", 1.0, b.op("Sqrt", b.op("Add", variance, float(attribute(node, "epsilon", 1e-5)))))
    others = b.ints(0, *range(2, len(dims(x))))
    dx = dg = db = None
    if wanted[0]:
        dx = b.op("Mul", dy, b.op("Reshape", b.op("Mul", gamma, inverse), column))
    if wanted[1]:
        centred = b.op("Sub", x, b.op("Reshape", mean, column))
        dg = b.op("Mul", b.op("ReduceSum", b.op("Mul", dy, centred), others, keepdims=0), inverse)
    if wanted[2]:
        db = b.op("ReduceSum", dy, others, keepdims=0)
    return dx, dg, db, None, None


@gradient("MaxPool")
def _max_pool(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """dy goes to the first maximum of each window, as in torch."""
    x = node.inputs[0]
    assert x is not None
    window = _pool_window(node)
    if any(d != 1 for d in window.dilations) or attribute(node, "storage_order", 0):
        raise UnsupportedAttribute("dilations or storage_order")
    outs = static(node.outputs[0], 2)
    tiled = window.kernel == window.strides and not any(window.pads)
    if tiled and all(n * k <= size for n, k, size in zip(outs, window.kernel, static(x, 2), strict=True)):
        return (_tiled_max(b, x, dy, outs, window.kernel),)
    # Windows overlap: the runtime says where each maximum came from, counted over the whole tensor.
    node.resize_outputs(2)
    indices = node.outputs[1]
    indices.name, indices.type = f"{node.outputs[0].name}.indices", ir.TensorType(ir.DataType.INT64)
    indices.shape = node.outputs[0].shape
    flat = b.ints(-1)
    zeros = b.op("Expand", 0.0, b.op("Shape", b.op("Reshape", x, flat)))
    moved = b.op("Reshape", indices, flat), b.op("Reshape", dy, flat)
    return (_like(b, b.op("ScatterElements", zeros, *moved, axis=0, reduction="add"), x),)


def _tiled_max(b: Builder, x: ir.Value, dy: ir.Value, outs: tuple[int, ...], kernel: tuple[int, ...]) -> ir.Value:
    """Windows side by side: cut, mark the first maximum of each, put together again."""
    channels, *sizes = static(x, 1)
    rank = len(kernel)
    used = [n * k for n, k in zip(outs, kernel, strict=True)]
    axes = list(range(2, rank + 2))
    seen = x
    if used != sizes:
        seen = b.op("Slice", x, b.ints(*[0] * rank), b.ints(*used), b.ints(*axes), b.ints(*[1] * rank))
    pairs = [size for pair in zip(outs, kernel, strict=True) for size in pair]
    apart = b.op("Reshape", seen, b.ints(-1, channels, *pairs))
    forth = [0, 1, *(2 + 2 * i for i in range(rank)), *(3 + 2 * i for i in range(rank))]
    if rank > 1:
        apart = b.op("Transpose", apart, perm=forth)
    count = math.prod(kernel)
    windows = b.op("Reshape", apart, b.ints(-1, channels, *outs, count))
    largest = b.op("ArgMax", windows, axis=-1, keepdims=0)
    mark = b.op("OneHot", largest, b.const(np.array(count)), b.const(np.array([0, 1], np.float32)), axis=-1)
    spread = b.op("Mul", mark, b.op("Unsqueeze", dy, b.ints(-1)))
    if rank > 1:
        split = b.op("Reshape", spread, b.ints(-1, channels, *outs, *kernel))
        spread = b.op("Transpose", split, perm=[int(i) for i in np.argsort(forth)])
    whole = b.op("Reshape", spread, b.ints(-1, channels, *used))
    if used == sizes:
        return whole
    rest = [size - n for size, n in zip(sizes, used, strict=True)]
    return b.op("Pad", whole, b.ints(*[0] * (rank + 2), 0, 0, *rest))


def _pool_window(node: ir.Node) -> _Window:
    kernel = tuple(attribute(node, "kernel_shape"))
    rank = len(kernel)
    if attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise UnsupportedAttribute(f"auto_pad = {attribute(node, 'auto_pad')}")
    return _Window(
        kernel,
        tuple(attribute(node, "strides", [1] * rank)),
        tuple(attribute(node, "pads", [0] * 2 * rank)),
        tuple(attribute(node, "dilations", [1] * rank)),
    )


@gradient("AveragePool")
def _average_pool(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """Each window's dy, divided by what it counted, is added to all of its places: a depth-wise ConvTranspose with ones."""
    x = node.inputs[0]
    assert x is not None
    window = _pool_window(node)
    if attribute(node, "ceil_mode", 0) or any(d != 1 for d in window.dilations):
        raise UnsupportedAttribute("ceil_mode or dilations")
    channels, *sizes = static(x, 1)
    outs, rank = static(node.outputs[0], 2), window.rank
    counts = np.full(outs, math.prod(window.kernel), np.float32)
    if any(window.pads) and not attribute(node, "count_include_pad", 0):
        for place in np.ndindex(*outs):
            spans = [
                min(size, i * s - p + k) - max(0, i * s - p)
                for i, s, p, k, size in zip(
                    place, window.strides, window.pads[:rank], window.kernel, sizes, strict=True
                )
            ]
            counts[place] = math.prod(spans)
    share = b.op("Div", dy, b.const(counts))
    short = [
        size - (s * (n - 1) + k - p - q)
        for size, n, s, k, p, q in zip(
            sizes, outs, window.strides, window.kernel, window.pads[:rank], window.pads[rank:], strict=True
        )
    ]
    ones = b.const(np.ones((channels, 1, *window.kernel), np.float32))
    return (
        b.op(
            "ConvTranspose",
            share,
            ones,
            strides=list(window.strides),
            pads=list(window.pads),
            output_padding=short,
            group=channels,
        ),
    )


@gradient("GlobalAveragePool")
def _global_average_pool(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """dy / count, repeated over the map."""
    x = node.inputs[0]
    assert x is not None
    return (b.op("Expand", b.op("Div", dy, float(math.prod(static(x, 2)))), b.op("Shape", x)),)


@gradient("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """The shape of the input again."""
    x = node.inputs[0]
    assert x is not None
    return _like(b, dy, x), None


@gradient("Transpose")
def _transpose(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """The inverse permutation."""
    rank = len(dims(node.outputs[0]))
    perm = attribute(node, "perm", list(range(rank))[::-1])
    return (b.op("Transpose", dy, perm=[int(i) for i in np.argsort(perm)]),)


@gradient("Identity")
def _identity(_b: Builder, _node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """The gradient itself."""
    return (dy,)
