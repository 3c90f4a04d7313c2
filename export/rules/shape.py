"""Gradients of operators that move elements and compute nothing: the way back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from export.gradients import Gradients, UnsupportedAttribute, Wanted, gradient, gradient_of_all, unbroadcast
from export.graph import Builder, array_of, attribute, dims, given, reshaped


@gradient("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """The shape of the input again."""
    return reshaped(b, dy, given(node, 0)), None


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


@gradient("Expand")
def _expand(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """The sum over what was repeated."""
    return unbroadcast(b, dy, dims(node.outputs[0]), given(node, 0)), None


@gradient("Concat")
def _concat(b: Builder, node: ir.Node, dy: ir.Value, wanted: Wanted) -> Gradients:
    """Each input's part of dy."""
    parts = [given(node, index) for index in range(len(node.inputs))]
    axis = attribute(node, "axis") % len(dims(node.outputs[0]))
    sizes = [dims(part)[axis] for part in parts]
    if all(isinstance(size, int) for size in sizes):
        if sum(wanted) > 1:
            cut = b.ops(len(parts), "Split", dy, b.ints(*(int(size) for size in sizes)), axis=axis)
            return [part if asked else None for part, asked in zip(cut, wanted, strict=True)]
        bounds: list[ir.Value] = [b.ints(end) for end in itertools.accumulate((int(s) for s in sizes), initial=0)]
    else:  # along the batch: counted when the step runs
        bounds = [b.ints(0)]
        for part in parts:
            bounds.append(b.op("Add", bounds[-1], b.op("Shape", part, start=axis, end=axis + 1)))
    return [
        b.op("Slice", dy, start, end, b.ints(axis)) if asked else None
        for asked, (start, end) in zip(wanted, itertools.pairwise(bounds), strict=True)
    ]


@gradient_of_all("Split")
def _split(b: Builder, node: ir.Node, dys: Sequence[ir.Value | None], _wanted: Wanted) -> Gradients:
    """The parts side by side again, zeros for one that nothing read."""
    axis = attribute(node, "axis", 0)
    parts = [b.op("Mul", output, 0.0) if dy is None else dy for output, dy in zip(node.outputs, dys, strict=True)]
    return b.op("Concat", *parts, axis=axis), None


@gradient("Pad")
def _pad(b: Builder, node: ir.Node, dy: ir.Value, _wanted: Wanted) -> Gradients:
    """Constant mode: the padding cut off again, and zeros put back where a negative count had cut."""
    if attribute(node, "mode", "constant") != "constant":
        raise UnsupportedAttribute(f"mode = {attribute(node, 'mode')}")
    counts = array_of(given(node, 1))
    held = node.inputs[3] if len(node.inputs) > 3 else None
    axes = array_of(held) if held is not None else np.arange(len(dims(given(node, 0))))
    if counts is None or axes is None:
        raise UnsupportedAttribute("counts that are computed")
    before, after = np.split(counts, 2)
    if (counts > 0).any():
        ends = np.where(after > 0, -after, np.iinfo(np.int64).max)
        dy = b.op("Slice", dy, b.const(before.clip(0)), b.const(ends), b.const(axes.astype(np.int64)))
    if (counts < 0).any():
        dy = b.op("Pad", dy, b.const((-counts).clip(0)), None, b.const(axes.astype(np.int64)))
    return dy, None, None, None
