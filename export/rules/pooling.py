"""Gradients of pooling."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from export.gradients import Gradients, UnsupportedAttribute, Wanted, gradient
from export.graph import Builder, attribute, dims, expanded, given, reshaped, static
from export.rules.elementwise import masked
from export.rules.windows import FLAT, Window, apart, behind, together, window_of


@gradient("MaxPool")
def _max_pool(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """dy goes to the first maximum of each window, as in torch."""
    x = given(node, 0)
    window = window_of(node, attribute(node, "kernel_shape"))
    if attribute(node, "storage_order", 0):
        raise UnsupportedAttribute("storage_order = 1")
    outs = static(node.outputs[0], 2)
    tiled = window.kernel == window.strides and not any(window.pads) and set(window.dilations) == {1}
    if tiled and all(n * k <= size for n, k, size in zip(outs, window.kernel, static(x, 2), strict=True)):
        return (_tiled_max(b, x, node.outputs[0], dy, outs, window.kernel),)
    # Windows overlap: the runtime says where each maximum came from, counted over the whole tensor.
    if len(node.outputs) < 2:
        node.resize_outputs(2)
    indices = node.outputs[1]
    indices.name = indices.name or f"{node.outputs[0].name}/indices"
    indices.shape, indices.type = node.outputs[0].shape, ir.TensorType(ir.DataType.INT64)
    flat = b.ints(*FLAT)
    zeros = b.op("Expand", 0.0, b.op("Shape", b.op("Reshape", x, flat)))
    moved = b.op("Reshape", indices, flat), b.op("Reshape", dy, flat)
    return (reshaped(b, b.op("ScatterElements", zeros, *moved, axis=1, reduction="add"), x),)


def _tiled_max(
    b: Builder, x: ir.Value, y: ir.Value, dy: ir.Value, outs: tuple[int, ...], kernel: tuple[int, ...]
) -> ir.Value:
    """Windows side by side: the first place that holds the maximum takes dy, and leaves none to those behind it."""
    channels, *sizes = static(x, 1)
    used = [n * k for n, k in zip(outs, kernel, strict=True)]
    if used != sizes:
        axes = range(2, len(kernel) + 2)
        x = b.op("Slice", x, b.ints(*[0] * len(kernel)), b.ints(*used), b.ints(*axes))
    flat = b.ints(*FLAT)
    y, left = b.op("Reshape", y, flat), b.op("Reshape", dy, flat)
    taken = []
    for part in apart(b, x, outs, kernel)[:-1]:
        taken.append(masked(b, b.op("Equal", part, y), left))
        left = b.op("Sub", left, taken[-1])
    return behind(b, together(b, [*taken, left], outs, kernel), channels, used, sizes)


@gradient("AveragePool")
def _average_pool(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """Each window's dy, divided by what it counted, is added to all of its places: a depth-wise ConvTranspose with ones."""
    x = given(node, 0)
    window = window_of(node, attribute(node, "kernel_shape"))
    if attribute(node, "ceil_mode", 0):
        raise UnsupportedAttribute("ceil_mode = 1")
    if any(d != 1 for d in window.dilations):
        raise UnsupportedAttribute(f"dilations = {list(window.dilations)}")
    channels, *sizes = static(x, 1)
    outs = static(node.outputs[0], 2)
    counts = np.full(outs, math.prod(window.kernel), np.float32)
    if any(window.pads) and not attribute(node, "count_include_pad", 0):
        counts = _counted(window, outs, tuple(sizes))
    share = b.op("Div", dy, b.const(counts))
    if window.kernel == window.strides and not any(window.pads):
        used = [n * k for n, k in zip(outs, window.kernel, strict=True)]
        parts = [b.op("Reshape", share, b.ints(*FLAT))] * math.prod(window.kernel)
        return (behind(b, together(b, parts, outs, window.kernel), channels, used, sizes),)
    ones = b.const(np.ones((channels, 1, *window.kernel), np.float32))
    return (
        b.op(
            "ConvTranspose",
            share,
            ones,
            strides=list(window.strides),
            pads=list(window.pads),
            output_padding=window.output_padding(tuple(sizes), outs),
            group=channels,
        ),
    )


def _counted(window: Window, outs: tuple[int, ...], sizes: tuple[int, ...]) -> np.ndarray:
    """How many places of the input each window sees, float32 `outs`."""
    counts = np.ones(outs, np.float32)
    for axis, (n, size) in enumerate(zip(outs, sizes, strict=True)):
        starts = np.arange(n) * window.strides[axis] - window.pads[axis]
        seen = np.minimum(starts + window.kernel[axis], size) - np.maximum(starts, 0)
        counts *= seen.reshape([-1 if i == axis else 1 for i in range(len(outs))]).astype(np.float32)
    return counts


@gradient("GlobalAveragePool")
def _global_average_pool(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """dy / count, repeated over the map."""
    x = given(node, 0)
    return (expanded(b, b.op("Div", dy, float(math.prod(static(x, 2)))), dims(node.outputs[0]), x),)
