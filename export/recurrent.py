"""LSTM and GRU unrolled into explicit cells, so that they can be trained (step-graphs.md, 3.3).

The operators give no activations of single steps, so they have no gradient rule. Unrolled they have: one product over all
steps for the inputs, then per step one product with the state and a few element-wise operators. Covered are forward,
reverse and bidirectional layers with the standard activations; not covered peepholes, lengths, clipping, and more than
64 steps: cut the sequence, or train a layer behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from export.decompose import decomposition
from export.gradients import UnsupportedAttribute
from export.graph import Builder, attribute, dims, given

STEPS_LIMIT: Final = 64

# (what the inputs give to a step [batch, gates * hidden], the states before it) -> the states after it, the output first
Cell = Callable[[ir.Value, Sequence[ir.Value]], Sequence[ir.Value]]


@dataclass(frozen=True)
class _Weights:
    """One direction: `w` [gates * hidden, inputs], `r` [gates * hidden, hidden], biases [gates * hidden] or None."""

    w: ir.Value
    r: ir.Value
    input_bias: ir.Value | None
    state_bias: ir.Value | None


@decomposition("LSTM")
def _lstm(b: Builder, node: ir.Node) -> Sequence[ir.Value]:
    """i, o, f = sigmoid(...), g = tanh(...) of x W^T + h R^T + both biases; c' = f * c + i * g; h' = o * tanh(c')."""
    if _optional(node, 7) is not None or attribute(node, "input_forget", 0):
        raise UnsupportedAttribute("peepholes or input_forget")
    _check(node, ["Sigmoid", "Tanh", "Tanh"])
    hidden = attribute(node, "hidden_size")

    def cell(weights: _Weights) -> Cell:
        def step(given_by_input: ir.Value, states: Sequence[ir.Value]) -> Sequence[ir.Value]:
            h, c = states
            gates = b.op("Add", given_by_input, b.op("Gemm", h, weights.r, weights.state_bias, transB=1))
            open_gates, new = b.ops(2, "Split", gates, b.ints(3 * hidden, hidden), axis=1)
            i, o, f = b.ops(3, "Split", b.op("Sigmoid", open_gates), b.ints(hidden, hidden, hidden), axis=1)
            c = b.op("Add", b.op("Mul", f, c), b.op("Mul", i, b.op("Tanh", new)))
            return b.op("Mul", o, b.op("Tanh", c)), c

        return step

    return _unrolled(b, node, cell, [_optional(node, 5), _optional(node, 6)])


@decomposition("GRU")
def _gru(b: Builder, node: ir.Node) -> Sequence[ir.Value]:
    """z, r = sigmoid(x W^T + h R^T + biases); n = tanh(x W^T + r * (h R^T + bias)), or with (r * h) R^T where
    linear_before_reset = 0; h' = (1 - z) * n + z * h."""
    _check(node, ["Sigmoid", "Tanh"])
    hidden = attribute(node, "hidden_size")
    linear_before_reset = attribute(node, "linear_before_reset", 0)

    def cell(weights: _Weights) -> Cell:
        parts = b.ints(2 * hidden, hidden)
        r_gates = r_new = bias_gates = bias_new = None
        if not linear_before_reset:
            r_gates, r_new = b.ops(2, "Split", weights.r, parts, axis=0)
            if weights.state_bias is not None:
                bias_gates, bias_new = b.ops(2, "Split", weights.state_bias, parts, axis=0)

        def step(given_by_input: ir.Value, states: Sequence[ir.Value]) -> Sequence[ir.Value]:
            (h,) = states
            from_gates, from_new = b.ops(2, "Split", given_by_input, parts, axis=1)
            if linear_before_reset:
                state = b.op("Gemm", h, weights.r, weights.state_bias, transB=1)
                state_gates, state_new = b.ops(2, "Split", state, parts, axis=1)
            else:
                state_gates = b.op("Gemm", h, r_gates, bias_gates, transB=1)
            gates = b.op("Sigmoid", b.op("Add", from_gates, state_gates))
            z, r = b.ops(2, "Split", gates, b.ints(hidden, hidden), axis=1)
            if linear_before_reset:
                reset = b.op("Mul", r, state_new)
            else:
                reset = b.op("Gemm", b.op("Mul", r, h), r_new, bias_new, transB=1)
            new = b.op("Tanh", b.op("Add", from_new, reset))
            return (b.op("Add", new, b.op("Mul", z, b.op("Sub", h, new))),)

        return step

    return _unrolled(b, node, cell, [_optional(node, 5)])


def _optional(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _check(node: ir.Node, standard: list[str]) -> None:
    given_names = attribute(node, "activations")
    if given_names is not None and [str(name).title() for name in given_names] != standard * (
        len(given_names) // len(standard)
    ):
        raise UnsupportedAttribute(f"activations = {list(given_names)}")
    if attribute(node, "clip") is not None:
        raise UnsupportedAttribute("clip")
    if _optional(node, 4) is not None:
        raise UnsupportedAttribute("sequence_lens")
    steps = dims(given(node, 0))[1 if attribute(node, "layout", 0) else 0]
    if not isinstance(steps, int) or steps > STEPS_LIMIT:
        raise UnsupportedAttribute(f"a sequence of {steps} steps, above {STEPS_LIMIT},")


def _unrolled(
    b: Builder, node: ir.Node, cell: Callable[[_Weights], Cell], initial: Sequence[ir.Value | None]
) -> Sequence[ir.Value]:
    """All directions, step by step: Y [steps, directions, batch, hidden] and the last states [directions, batch, hidden]."""
    batch_first = attribute(node, "layout", 0)
    direction = str(attribute(node, "direction", "forward"))
    x = given(node, 0)
    if batch_first:
        x = b.op("Transpose", x, perm=[1, 0, 2])
        initial = [value if value is None else b.op("Transpose", value, perm=[1, 0, 2]) for value in initial]
    sizes = dims(given(node, 0))
    count = int(sizes[1 if batch_first else 0])
    backwards = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]
    outputs, last = [], []
    for number, turned in enumerate(backwards):
        weights = _weights(b, node, number, len(backwards))
        states = [_start(b, x, value, number, attribute(node, "hidden_size")) for value in initial]
        steps = _steps(b, x, weights, count)
        step, made = cell(weights), []
        for given_by_input in reversed(steps) if turned else steps:
            states = list(step(given_by_input, states))
            made.append(b.op("Unsqueeze", states[0], b.ints(0)))
        outputs.append(b.op("Unsqueeze", _joined(b, made[::-1] if turned else made, 0), b.ints(1)))
        last.append([b.op("Unsqueeze", state, b.ints(0)) for state in states])
    results = [_joined(b, outputs, 1), *(_joined(b, list(parts), 0) for parts in zip(*last, strict=True))]
    if batch_first:
        results = [b.op("Transpose", results[0], perm=[2, 0, 1, 3])] + [
            b.op("Transpose", value, perm=[1, 0, 2]) for value in results[1:]
        ]
    return results


def _joined(b: Builder, parts: Sequence[ir.Value], axis: int) -> ir.Value:
    return parts[0] if len(parts) == 1 else b.op("Concat", *parts, axis=axis)


def _weights(b: Builder, node: ir.Node, number: int, directions: int) -> _Weights:
    def of_direction(value: ir.Value) -> ir.Value:
        if directions == 1:
            return b.op("Squeeze", value, b.ints(0))
        part = b.op("Slice", value, b.ints(number), b.ints(number + 1), b.ints(0))
        return b.op("Squeeze", part, b.ints(0))

    w, r, bias = of_direction(given(node, 1)), of_direction(given(node, 2)), _optional(node, 3)
    if bias is None:
        return _Weights(w, r, None, None)
    half = int(dims(bias)[1]) // 2
    return _Weights(w, r, *b.ops(2, "Split", of_direction(bias), b.ints(half, half), axis=0))


def _start(b: Builder, x: ir.Value, initial: ir.Value | None, number: int, hidden: int) -> ir.Value:
    """The state before the first step, [batch, hidden]; zeros if none is given."""
    if initial is not None:
        part = b.op("Slice", initial, b.ints(number), b.ints(number + 1), b.ints(0))
        return b.op("Squeeze", part, b.ints(0))
    batch = b.op("Shape", x, start=1, end=2)
    return b.op("Expand", 0.0, b.op("Concat", batch, b.ints(hidden), axis=0))


def _steps(b: Builder, x: ir.Value, weights: _Weights, count: int) -> list[ir.Value]:
    """What the inputs give to each step, by one product over all of them."""
    product = b.op("MatMul", x, b.op("Transpose", weights.w, perm=[1, 0]))
    if weights.input_bias is not None:
        product = b.op("Add", product, weights.input_bias)
    if count == 1:
        return [b.op("Squeeze", product, b.ints(0))]
    parts = b.ops(count, "Split", product, b.ints(*[1] * count), axis=0)
    return [b.op("Squeeze", part, b.ints(0)) for part in parts]
