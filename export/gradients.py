"""Reverse-mode differentiation, ONNX graph in, ONNX graph out (step-graphs.md, section 3).

`differentiate` appends the backward nodes of a scalar loss; one small rule per operator stands in `gradient_rules`. The
activity analysis is what makes partial training cheap: the backward pass never enters what lies below the first trainable
tensor, and no rule is asked for a gradient that nobody wants.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from export.errors import NoGradientRule, NotDifferentiable, UnknownShape
from export.graph import Builder, Dims, dims

log = logging.getLogger(__name__)

Gradients = Sequence[ir.Value | None]
Rule = Callable[[Builder, ir.Node, ir.Value, Sequence[bool]], Gradients]
RULES: dict[str, Rule] = {}

# What comes out of these does not move with what goes in, or is no number that could.
_OPAQUE = ("Shape", "Size", "ArgMax", "ArgMin", "Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "OneHot")


class UnsupportedAttribute(Exception):
    """A rule met an attribute that it does not cover; it never computes a wrong gradient instead."""


def gradient(*op_types: str) -> Callable[[Rule], Rule]:
    """Register a rule. It returns one gradient, or None, per input of the node; `wanted` says which are asked for."""

    def register(rule: Rule) -> Rule:
        for op_type in op_types:
            RULES[op_type] = rule
        return rule

    return register


def differentiate(builder: Builder, loss: ir.Value, wrt: Sequence[ir.Value]) -> dict[ir.Value, ir.Value]:
    """Append the backward nodes of `loss` (a scalar) to the builder's graph; return the gradient of each of `wrt`.

    A value that does not influence the loss gets zeros and a warning. Raises `NoGradientRule` naming every operator
    without a rule, `UnknownShape`, and `NotDifferentiable` if no value of `wrt` reaches the loss.
    """
    from export import gradient_rules  # noqa: F401 - registers the rules

    nodes = list(builder.graph)
    active = _active(nodes, wrt)
    relevant = _relevant(nodes, active, loss)
    if not any(value in relevant for value in wrt):
        names = ", ".join(str(value.name) for value in wrt)
        raise NotDifferentiable(f"none of {names} reaches the loss: choose other tensors to train")
    path = [node for node in nodes if any(output in relevant for output in node.outputs)]
    _check_rules(path, relevant, wrt, loss)
    contributions: dict[ir.Value, list[ir.Value]] = {loss: [builder.const(np.array(1, np.float32))]}
    failed: list[str] = []
    for node in reversed(path):
        output = node.outputs[0]
        if output not in contributions:
            continue
        builder.scope = f"grad/{node.name or node.op_type}"
        dy = _total(builder, contributions[output])
        contributions[output] = [dy]
        wanted = [value is not None and value in relevant for value in node.inputs]
        try:
            gradients = RULES[node.op_type](builder, node, dy, wanted)
        except UnsupportedAttribute as error:
            failed.append(f"{node.op_type} (node {node.name!r}) with {error}")
            continue
        for value, found, asked in zip(node.inputs, gradients, wanted, strict=False):
            if asked:
                assert value is not None
                assert found is not None, node.op_type
                contributions.setdefault(value, []).append(found)
    if failed:
        raise NoGradientRule(failed)
    builder.scope = "grad"
    return {value: _of(builder, value, contributions.get(value)) for value in wrt}


def unbroadcast(builder: Builder, dx: ir.Value, came: Dims, target: ir.Value) -> ir.Value:
    """Sum a gradient of shape `came` over the axes along which `target` was repeated. Raises `UnknownShape`."""
    wanted = dims(target)
    lead = len(came) - len(wanted)
    if lead:
        dx = builder.op("ReduceSum", dx, builder.ints(*range(lead)), keepdims=0)
    repeated = []
    for axis, (size, kept) in enumerate(zip(came[lead:], wanted, strict=True)):
        if kept == 1 and size != 1:
            repeated.append(axis)
        elif kept != size:
            raise UnknownShape(
                f"axis {axis} of {target.name!r} is {kept}, its use has {size}: cannot tell whether it repeats"
            )
    return builder.op("ReduceSum", dx, builder.ints(*repeated), keepdims=1) if repeated else dx


def _active(nodes: Sequence[ir.Node], wrt: Sequence[ir.Value]) -> set[ir.Value]:
    active = set(wrt)
    for node in nodes:
        if node.op_type not in _OPAQUE and any(value in active for value in node.inputs if value is not None):
            active.update(node.outputs)
    return active


def _relevant(nodes: Sequence[ir.Node], active: set[ir.Value], loss: ir.Value) -> set[ir.Value]:
    relevant = {loss} & active
    for node in reversed(nodes):
        if any(output in relevant for output in node.outputs):
            relevant.update(value for value in node.inputs if value is not None and value in active)
    return relevant


def _check_rules(path: Sequence[ir.Node], relevant: set[ir.Value], wrt: Sequence[ir.Value], loss: ir.Value) -> None:
    missing = [node for node in path if node.op_type not in RULES]
    if missing:
        raise NoGradientRule([_finding(node, relevant, wrt, loss) for node in missing])


def _finding(node: ir.Node, relevant: set[ir.Value], wrt: Sequence[ir.Value], loss: ir.Value) -> str:
    """The node, and a way from a trainable tensor through it to the loss."""
    before: list[str] = []
    value = next(v for v in node.inputs if v is not None and v in relevant)
    while value not in wrt:
        producer = value.producer()
        assert producer is not None
        before.insert(0, producer.op_type)
        value = next(v for v in producer.inputs if v is not None and v in relevant)
    after: list[str] = []
    reached = node.outputs[0]
    while reached is not loss:
        user = next(u for u in reached.consumers() if any(output in relevant for output in u.outputs))
        after.append(user.op_type)
        reached = user.outputs[0]
    return (
        f"{node.op_type} (node {node.name!r}; {' -> '.join([str(value.name), *before, node.op_type, *after, 'loss'])})"
    )


def _total(builder: Builder, parts: Sequence[ir.Value]) -> ir.Value:
    """The sum, last consumer's part last: a fixed order makes reproducible files."""
    total = parts[-1]
    for part in reversed(parts[:-1]):
        total = builder.op("Add", total, part)
    return total


def _of(builder: Builder, value: ir.Value, parts: Sequence[ir.Value] | None) -> ir.Value:
    if parts is not None:
        return _total(builder, parts)
    log.warning("%s does not influence the loss: its gradient is zero", value.name)
    return builder.op("Mul", value, 0.0)


def rules() -> Mapping[str, Rule]:
    """Every registered rule, by operator."""
    from export import gradient_rules  # noqa: F401

    return RULES
