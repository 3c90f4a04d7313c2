"""Gradients of operators that pick elements: dy goes back to where they were taken from, zeros elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edge_sdk.tensors import Array
from export.gradients import Gradients, UnsupportedAttribute, Wanted, gradient
from export.graph import Builder, array_of, attribute, dims, given


@gradient("Slice")
def _slice(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """Steps of 1: padded with zeros; other steps: each place picks its part of dy, or a zero."""
    x = given(node, 0)
    sizes = dims(x)
    starts, ends, axes, steps = (_constant(node, index) for index in range(1, 5))
    if starts is None or ends is None:
        raise UnsupportedAttribute("bounds that are computed")
    count = len(starts)
    places = range(count) if axes is None else [int(axis) % len(sizes) for axis in axes]
    strides = [1] * count if steps is None else [int(step) for step in steps]
    before, after = [0] * len(sizes), [0] * len(sizes)
    for start, end, axis, step in zip(starts, ends, places, strides, strict=True):
        size = sizes[axis]
        if not isinstance(size, int):
            if start == 0 and step == 1 and end >= 2**31 - 1:
                continue
            raise UnsupportedAttribute("a slice of the batch")
        taken = np.arange(size)[slice(int(start), None if step < 0 and end < -size else int(end), step)]
        if step != 1:
            dy = _put_back(b, dy, taken, size, axis)
        else:
            first = int(taken[0]) if len(taken) else 0
            before[axis], after[axis] = first, size - first - len(taken)
    if any(before) or any(after):
        dy = b.op("Pad", dy, b.ints(*before, *after))
    return dy, None, None, None, None


def _constant(node: ir.Node, index: int) -> Array | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    content = array_of(value)
    if value is not None and content is None:
        raise UnsupportedAttribute("bounds that are computed")
    return content


def _put_back(b: Builder, dy: ir.Value, taken: Array, size: int, axis: int) -> ir.Value:
    """Place i of the axis gets the part of dy that was taken from it, or the zero put behind them. No place twice."""
    came = np.full(size, len(taken), np.int64)
    came[taken] = np.arange(len(taken))
    if len(taken) < size:
        dy = b.op("Pad", dy, b.ints(0, 1), None, b.ints(axis))
    return b.op("Gather", dy, b.const(came), axis=axis)


@gradient("Gather")
def _gather(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """One constant index: padded with zeros; constant indices without repetition: put back; else: added row by row."""
    x, indices = given(node, 0), given(node, 1)
    rank = len(dims(x))
    axis = attribute(node, "axis", 0) % rank
    fixed = array_of(indices)
    if fixed is not None and isinstance(dims(x)[axis], int):
        size = int(dims(x)[axis])
        places = fixed.astype(np.int64) % size
        if fixed.ndim == 0:
            before, after = [0] * rank, [0] * rank
            before[axis], after[axis] = int(places), size - int(places) - 1
            return b.op("Pad", b.op("Unsqueeze", dy, b.ints(axis)), b.ints(*before, *after)), None
        if fixed.ndim == 1 and len(np.unique(places)) == len(places):
            return _put_back(b, dy, places, size, axis), None
    picked = len(dims(indices))
    rows = [*range(axis, axis + picked), *range(axis), *range(axis + picked, rank - 1 + picked)]
    if axis:
        dy = b.op("Transpose", dy, perm=rows)
    front = [axis, *(i for i in range(rank) if i != axis)]
    turned = b.op("Transpose", x, perm=front) if axis else x
    zeros = _zeros(b, turned, [dims(x)[i] for i in front])
    added = b.op("ScatterND", zeros, b.op("Unsqueeze", indices, b.ints(-1)), dy, reduction="add")
    return (b.op("Transpose", added, perm=[int(i) for i in np.argsort(front)]) if axis else added), None


def _zeros(b: Builder, like: ir.Value, sizes: Sequence[int | str]) -> ir.Value:
    """Zeros in the shape of a value."""
    if all(isinstance(size, int) for size in sizes):
        return b.op("Expand", 0.0, b.ints(*(int(size) for size in sizes)))
    return b.op("Expand", 0.0, b.op("Shape", like))


@gradient("GatherElements")
def _gather_elements(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """Added element by element to where each was taken from."""
    x = given(node, 0)
    axis = attribute(node, "axis", 0)
    return b.op("ScatterElements", _zeros(b, x, dims(x)), given(node, 1), dy, axis=axis, reduction="add"), None


@gradient("TopK")
def _top_k(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """The values go back to where their indices say; the indices have no gradient."""
    x = given(node, 0)
    axis = attribute(node, "axis", -1)
    return b.op("ScatterElements", _zeros(b, x, dims(x)), node.outputs[1], dy, axis=axis), None
