"""Reverse-mode differentiation, ONNX graph in, ONNX graph out (step-graphs.md, section 3).

`differentiate` appends the backward nodes of a scalar loss; one small rule per operator stands in `export/rules`. The
activity analysis is what makes partial training cheap: the backward pass never enters what lies below the first trainable
tensor, and no rule is asked for a gradient that nobody wants.

Two marks in a node's metadata change what is differentiated: `edgewise.stop_gradient` on an Identity ends the way, and
what is marked `edgewise.straight_through` hands the gradient of its output to its first input as it is (fake quantization).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from export.errors import DisconnectedTrainable, Finding, NoGradientRule, NotDifferentiable, UnknownShape
from export.graph import Builder, Dims, array_of, attribute, dims, given

log = logging.getLogger(__name__)

Wanted = Sequence[bool]
Gradients = Sequence[ir.Value | None]
Rule = Callable[[Builder, ir.Node, ir.Value, Wanted], Gradients]
RuleOfAll = Callable[[Builder, ir.Node, Sequence[ir.Value | None], Wanted], Gradients]

STOP_GRADIENT: Final = "edgewise.stop_gradient"
STRAIGHT_THROUGH: Final = "edgewise.straight_through"

RULES: Final[dict[str, Rule]] = {}
RULES_OF_ALL: Final[dict[str, RuleOfAll]] = {}

# What comes out of these does not move with what goes in, or is no number that could.
_OPAQUE: Final = frozenset(
    {"Shape", "Size", "ArgMax", "ArgMin", "OneHot", "NonZero", "IsNaN", "IsInf", "Not", "And", "Or"}
    | {"Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Round", "Floor", "Ceil", "Sign"}
)
# Of these only the first input counts: scales and zero points are not learned on a device.
_FIRST_ONLY: Final = frozenset(("QuantizeLinear", "DequantizeLinear"))
_SHOWN = 3  # operators on each side of a node in an error


class UnsupportedAttribute(Exception):
    """A rule met an attribute that it does not cover; it never computes a wrong gradient instead."""


def gradient(*op_types: str) -> Callable[[Rule], Rule]:
    """Register a rule. It returns one gradient, or None, per input of the node; `wanted` says which are asked for.

    `dy` is the gradient of the first output; if another output of the node is differentiated, `NoGradientRule` says so.
    """

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(op_types, rule))
        return rule

    return register


def gradient_of_all(*op_types: str) -> Callable[[RuleOfAll], RuleOfAll]:
    """Register a rule that gets the gradient, or None, of each output."""

    def register(rule: RuleOfAll) -> RuleOfAll:
        RULES_OF_ALL.update(dict.fromkeys(op_types, rule))
        return rule

    return register


def rules() -> frozenset[str]:
    """The operators that have a rule."""
    from export import rules as _rules  # noqa: F401 - registers them

    return frozenset(RULES) | frozenset(RULES_OF_ALL)


@dataclass(frozen=True)
class Path:
    """What lies between the trained values and the loss: the nodes in order, and the values that depend and matter."""

    nodes: tuple[ir.Node, ...]
    relevant: frozenset[ir.Value]


def path_between(graph: ir.Graph, wrt: Iterable[ir.Value], loss: ir.Value) -> Path:
    """Forward from `wrt` and backward from `loss`: the nodes that the backward pass will visit."""
    nodes = list(graph)
    active = set(wrt)
    for node in nodes:
        if passes_gradient(node) and any(value in active for value in _differentiable_inputs(node)):
            active.update(output for output in node.outputs if _is_number(output, node))
    relevant = {loss} & active
    for node in reversed(nodes):
        if passes_gradient(node) and any(output in relevant for output in node.outputs):
            relevant.update(value for value in _differentiable_inputs(node) if value in active)
    return Path(tuple(n for n in nodes if any(output in relevant for output in n.outputs)), frozenset(relevant))


def passes_gradient(node: ir.Node) -> bool:
    """Whether anything differentiable comes out of a node."""
    if node.op_type == "Identity":
        return STOP_GRADIENT not in node.metadata_props
    return node.op_type not in _OPAQUE or STRAIGHT_THROUGH in node.metadata_props


def _first_only(node: ir.Node) -> bool:
    return node.op_type in _FIRST_ONLY or STRAIGHT_THROUGH in node.metadata_props


def _differentiable_inputs(node: ir.Node) -> list[ir.Value]:
    inputs = node.inputs[:1] if _first_only(node) else node.inputs
    return [value for value in inputs if value is not None]


def _is_number(value: ir.Value, node: ir.Node) -> bool:
    """Integers and truth values carry no gradient, but for the codes between QuantizeLinear and DequantizeLinear."""
    return value.dtype is None or value.dtype.is_floating_point() or node.op_type == "QuantizeLinear"


def differentiate(builder: Builder, loss: ir.Value, wrt: Sequence[ir.Value]) -> dict[ir.Value, ir.Value]:
    """Append the backward nodes of `loss` (a scalar) to the builder's graph; return the gradient of each of `wrt`.

    Shapes must be inferred. A value that does not influence the loss gets zeros and a warning. Raises `NoGradientRule`
    naming every operator without a rule, `UnknownShape`, `NotDifferentiable` if a value reaches the loss through integers
    only, and `DisconnectedTrainable` if none reaches it.
    """
    known = rules()
    path = path_between(builder.graph, wrt, loss)
    _check_reach(builder.graph, path, wrt, loss)
    missing = [node for node in path.nodes if node.op_type not in known and STRAIGHT_THROUGH not in node.metadata_props]
    if missing:
        raise _no_rule(builder.graph, path, wrt, loss, dict.fromkeys(missing, ""))
    contributions: dict[ir.Value, list[ir.Value]] = {loss: [builder.const(np.array(1, np.float32))]}
    failed: dict[ir.Node, str] = {}
    for node in reversed(path.nodes):
        builder.scope = f"grad/{node.name or node.op_type}"
        dys = [_total(builder, contributions, output) for output in node.outputs]
        if all(dy is None for dy in dys):
            continue
        wanted = [value is not None and value in path.relevant for value in node.inputs]
        if _first_only(node):
            wanted[1:] = [False] * (len(wanted) - 1)
        try:
            gradients = _apply(builder, node, dys, wanted)
        except UnsupportedAttribute as error:
            failed[node] = str(error)
            gradients = [
                builder.op("Mul", value, 0.0) if value and w else None
                for value, w in zip(node.inputs, wanted, strict=True)
            ]
        for value, found, asked in zip(node.inputs, gradients, wanted, strict=False):
            if asked:
                assert value is not None
                assert found is not None, node.op_type
                contributions.setdefault(value, []).append(found)
    if failed:
        raise _no_rule(builder.graph, path, wrt, loss, failed)
    builder.scope = "grad"
    return {value: _of(builder, value, contributions) for value in wrt}


def _apply(builder: Builder, node: ir.Node, dys: Sequence[ir.Value | None], wanted: Wanted) -> Gradients:
    if STRAIGHT_THROUGH in node.metadata_props:
        return [dys[0], *[None] * (len(node.inputs) - 1)]
    if node.op_type in RULES_OF_ALL:
        return RULES_OF_ALL[node.op_type](builder, node, dys, wanted)
    for number, dy in enumerate(dys[1:], 2):
        if dy is not None:
            raise UnsupportedAttribute(f"the use of its output {number}")
    assert dys[0] is not None
    return RULES[node.op_type](builder, node, dys[0], wanted)


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
                f"axis {axis} of {target.name!r} is {kept}, its use has {size}: cannot tell whether it repeats; "
                f"export the model with this axis static"
            )
    return builder.op("ReduceSum", dx, builder.ints(*repeated), keepdims=1) if repeated else dx


def _total(builder: Builder, contributions: dict[ir.Value, list[ir.Value]], value: ir.Value) -> ir.Value | None:
    """The sum, last consumer's part last: a fixed order makes reproducible files."""
    parts = contributions.get(value)
    if parts is None:
        return None
    last_first = parts[::-1]
    total = _over_all_rows(builder, last_first)
    if total is None:
        total = last_first[0]
        for part in last_first[1:]:
            total = builder.op("Add", total, part)
    contributions[value] = [total]
    return total


def _over_all_rows(builder: Builder, parts: Sequence[ir.Value]) -> ir.Value | None:
    """The sum of many products A^T B, or of many sums over the first axis, as one over all their rows; None for others.

    A weight that is used step after step, as in a recurrent layer, has one for each step.
    """
    makers = [part.producer() for part in parts]
    first = makers[0]
    if len(parts) < _MANY or first is None:
        return None
    kind = _row_sum(first)
    if kind is None or any(maker is None or _row_sum(maker) != kind for maker in makers):
        return None
    stacked = [
        builder.op("Concat", *(maker.inputs[index] for maker in makers if maker is not None), axis=0)
        for index in range(1 if kind[0] == "ReduceSum" else 2)
    ]
    if kind[0] == "ReduceSum":
        return builder.op("ReduceSum", *stacked, builder.ints(0), keepdims=0)
    return builder.op("Gemm", *stacked, transA=1, alpha=kind[1])


_MANY = 3


def _row_sum(node: ir.Node) -> tuple[str, float] | None:
    """What kind of sum over the rows of its operands a node is, with its factor."""
    if node.op_type == "Gemm" and len(node.inputs) == 2:
        if attribute(node, "transA", 0) and not attribute(node, "transB", 0):
            return "Gemm", float(attribute(node, "alpha", 1.0))
    elif node.op_type == "ReduceSum" and len(node.inputs) == 2 and not attribute(node, "keepdims", 1):
        axes = array_of(given(node, 1))
        if axes is not None and axes.tolist() == [0]:
            return "ReduceSum", 1.0
    return None


def _of(builder: Builder, value: ir.Value, contributions: dict[ir.Value, list[ir.Value]]) -> ir.Value:
    total = _total(builder, contributions, value)
    if total is not None:
        return total
    log.warning("%s does not influence the loss: its gradient is zero", value.name)
    return builder.op("Mul", value, 0.0)


# What errors say.


def _check_reach(graph: ir.Graph, path: Path, wrt: Sequence[ir.Value], loss: ir.Value) -> None:
    """Raise if a value of `wrt` cannot be trained, or none of them can."""
    lost = [value for value in wrt if value not in path.relevant]
    if not lost:
        return
    before_loss = _ancestors(loss)
    for value in lost:
        reached = {value}
        for node in graph:
            if node in before_loss and any(held in reached for held in node.inputs):
                if not passes_gradient(node) or not any(_is_number(output, node) for output in node.outputs):
                    raise NotDifferentiable(
                        f"{value.name} reaches the loss only through {node.op_type} (node {node.name!r}), whose result "
                        "does not move with it: train other tensors, or take this operator out of their way"
                    )
                reached.update(node.outputs)
    if len(lost) == len(wrt):
        names = ", ".join(str(value.name) for value in wrt)
        raise DisconnectedTrainable(f"none of {names} influences the loss: choose other tensors to train")


def _ancestors(loss: ir.Value) -> set[ir.Node]:
    found: set[ir.Node] = set()
    waiting = [loss]
    while waiting:
        node = waiting.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            waiting += [value for value in node.inputs if value is not None]
    return found


def _no_rule(
    graph: ir.Graph, path: Path, wrt: Sequence[ir.Value], loss: ir.Value, nodes: dict[ir.Node, str]
) -> NoGradientRule:
    findings = [_finding(node, reason, path, wrt, loss) for node, reason in nodes.items()]
    return NoGradientRule(findings, _trainable_behind(graph, set(nodes), loss))


def _finding(node: ir.Node, reason: str, path: Path, wrt: Sequence[ir.Value], loss: ir.Value) -> Finding:
    """The node, and a way from a trainable tensor through it to the loss."""
    trained = set(wrt)
    before: list[str] = []
    value = next(v for v in node.inputs if v is not None and v in path.relevant)
    while value not in trained:
        producer = value.producer()
        assert producer is not None
        before.insert(0, producer.op_type)
        value = next(v for v in producer.inputs if v is not None and v in path.relevant)
    after: list[str] = []
    reached = next(output for output in node.outputs if output in path.relevant)
    while reached is not loss:
        user = next(u for u in reached.consumers() if any(output in path.relevant for output in u.outputs))
        after.append(user.op_type)
        reached = next(output for output in user.outputs if output in path.relevant)
    head = before if len(before) <= _SHOWN else ["...", *before[-_SHOWN:]]
    tail = after if len(after) <= _SHOWN else [*after[:_SHOWN], "..."]
    return Finding(node.op_type, str(node.name), str(value.name), (*head, node.op_type, *tail), reason)


def _trainable_behind(graph: ir.Graph, nodes: set[ir.Node], loss: ir.Value) -> list[str]:
    """The float tensors that reach the loss without passing one of `nodes`, in order of use."""
    before_loss = _ancestors(loss)
    stopped: set[ir.Value] = set()  # values that pass one of the nodes on their way, seen from the end
    for node in reversed(list(graph)):
        if node in nodes or any(output in stopped for output in node.outputs):
            stopped.update(value for value in node.inputs if value is not None)
    behind = []
    for node in graph:
        for value in node.inputs if node in before_loss else ():
            tensor = value is not None and (value.is_initializer() or str(value.name).startswith("p."))
            if (
                tensor
                and value is not None
                and value not in stopped
                and value not in behind
                and value.dtype == ir.DataType.FLOAT
                and value.shape is not None
                and any(size != 1 for size in value.shape)
                and "/" not in str(value.name)  # a constant of ours
            ):
                behind.append(value)
    return [str(value.name).removeprefix("p.") for value in behind]
