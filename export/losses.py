"""Losses and scores as ONNX subgraphs, appended to a forward graph (step-graphs.md, sections 2.3 and 3.4).

Every loss is the weighted mean over the batch, `sum(w * l) / max(sum(w), 1e-12)`, a float32 scalar: a sample of weight 0
changes nothing, and devices with other batch sizes stay comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from edge_sdk.bundle import Score
from edge_sdk.tensors import Array
from export.errors import SpecError
from export.graph import Builder, dims


@dataclass(frozen=True)
class Accumulator:
    """One accumulator of an `evaluate` program: its table name, static shape, and what a batch adds to it."""

    name: str
    shape: tuple[int, ...]
    added: ir.Value


@dataclass(frozen=True)
class Loss:
    """A loss with what belongs to it.

    `target` gives dtype and sample shape of `d.y` from the output's shape; `build` appends the loss and returns the
    scalar; `evaluate` appends what the held-out samples are scored with.
    """

    target: Callable[[tuple[int, ...]], tuple[str, tuple[int, ...]]]
    build: Callable[[Builder, ir.Value, ir.Value, ir.Value], ir.Value]
    evaluate: Callable[[Builder, ir.Value, ir.Value, ir.Value], tuple[Accumulator, ...]]
    score: Score
    classifies: bool


def _mean(b: Builder, each: ir.Value, weight: ir.Value) -> ir.Value:
    total = b.op("Max", b.op("ReduceSum", weight, keepdims=0), 1e-12)
    return b.op("Div", b.op("ReduceSum", b.op("Mul", each, weight), keepdims=0), total, name="loss")


def _onehot(b: Builder, output: ir.Value, target: ir.Value) -> ir.Value:
    return b.op("OneHot", target, b.const(np.array(_classes(output))), b.const(np.array([0, 1], np.float32)), axis=-1)


def _classes(output: ir.Value) -> int:
    return int(dims(output)[-1])


def _cross_entropy(b: Builder, output: ir.Value, target: ir.Value, weight: ir.Value) -> ir.Value:
    """l_b = -sum_c onehot(y_b)_c log_softmax(z_b)_c; output `[batch, classes]`, target int64 `[batch]`."""
    picked = b.op("Mul", b.op("LogSoftmax", output, axis=-1), _onehot(b, output, target))
    return _mean(b, b.op("Neg", b.op("ReduceSum", picked, b.ints(1), keepdims=0)), weight)


def _mse_each(b: Builder, output: ir.Value, target: ir.Value) -> ir.Value:
    off = b.op("Sub", output, target)
    squared = b.op("Mul", off, off)
    rank = len(dims(output))
    return squared if rank == 1 else b.op("ReduceMean", squared, b.ints(*range(1, rank)), keepdims=0)


def _mse(b: Builder, output: ir.Value, target: ir.Value, weight: ir.Value) -> ir.Value:
    """l_b = the mean over the outputs of (z - y)^2; target float32 in the shape of the output."""
    return _mean(b, _mse_each(b, output, target), weight)


def _count_correct(b: Builder, output: ir.Value, target: ir.Value, weight: ir.Value) -> tuple[Accumulator, ...]:
    """Per class: samples seen, and samples named rightly, by weight."""
    column = b.op("Unsqueeze", weight, b.ints(1))
    seen = b.op("Mul", _onehot(b, output, target), column)
    right = b.op("Equal", b.op("ArgMax", output, axis=1, keepdims=0), target)
    hits = b.op("Mul", seen, b.op("Unsqueeze", b.op("Cast", right, to=ir.DataType.FLOAT.value), b.ints(1)))
    shape = (_classes(output),)
    return tuple(
        Accumulator(f"evaluate.{name}", shape, b.op("ReduceSum", value, b.ints(0), keepdims=0))
        for name, value in (("correct", hits), ("total", seen))
    )


def _sum_errors(b: Builder, output: ir.Value, target: ir.Value, weight: ir.Value) -> tuple[Accumulator, ...]:
    """The sum of squared errors (mean over the outputs of each sample), and of the weights."""
    errors = b.op("Mul", _mse_each(b, output, target), weight)
    return tuple(
        Accumulator(f"evaluate.{name}", (1,), b.op("ReduceSum", value, b.ints(0), keepdims=1))
        for name, value in (("error", errors), ("total", weight))
    )


LOSSES: Final[Mapping[str, Loss]] = {
    "cross_entropy": Loss(
        target=lambda _shape: ("int64", ()),
        build=_cross_entropy,
        evaluate=_count_correct,
        score=Score("evaluate.correct", "evaluate.total", "higher"),
        classifies=True,
    ),
    "mse": Loss(
        target=lambda shape: ("float32", shape),
        build=_mse,
        evaluate=_sum_errors,
        score=Score("evaluate.error", "evaluate.total", "lower"),
        classifies=False,
    ),
}


def loss_named(name: str) -> Loss:
    """The loss of that name. Raises `SpecError` listing the names."""
    if name not in LOSSES:
        raise SpecError(f"loss {name!r} is unknown; there are {', '.join(sorted(LOSSES))}")
    return LOSSES[name]


def check_output(loss: Loss, output: ir.Value, target: Array | None) -> None:
    """Raise `SpecError` when the model's output does not suit the loss."""
    sizes = dims(output)
    if loss.classifies and len(sizes) != 2:
        raise SpecError(f"the output has the shape {list(sizes)}; cross_entropy needs [batch, classes]")
    if target is not None and not loss.classifies and target.shape[1:] != sizes[1:]:
        raise SpecError(
            f"the targets have the shape {list(target.shape)}, the output {list(sizes)}; mse needs them equal"
        )
