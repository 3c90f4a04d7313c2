"""The proof of a step graph: its loss and every gradient against an oracle, at several batch sizes.

The oracle, in float64, is torch where the model came from torch, and central differences through ONNX's reference evaluator
elsewhere. Errors are relative, as `relative_error` says. Trained tensors are moved away from their initial values first: at B = 0 half of the gradients
of an adapter are zero and would prove nothing. Where float32 itself resolves less, as in the gradient of a sample that the
model is sure of, the oracle says by how much its own float32 is off, and twice that is forgiven.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from edge_sdk.sessions import FLOAT_PRODUCTS
from edge_sdk.tensors import Array
from export.errors import ProofFailed
from export.scopes import Effective, Trainable

BATCHES: Final = (1, 5, 16)
TOLERANCE: Final = 1e-4
_SMALL_LOSS: Final = 0.01  # below it float32 resolves no fixed share of a loss: logits of 10 leave 1e-6
_LARGEST, _RANDOM = 4, 4  # coordinates per tensor whose differences are taken
_STEP: Final = 1e-6
_SMALLEST: Final = 1e-3


@dataclass(frozen=True)
class Reference:
    """What an oracle says: the loss, the gradients (float64), and the largest error of each in the oracle's own float32."""

    loss: float
    gradients: Mapping[str, Array]
    rounding: Mapping[str, float]


class Oracle(Protocol):
    """Whom we believe. Gradients that it does not know are NaN."""

    name: str

    def __call__(self, trained: Mapping[str, Array], effective: Effective, x: Array, y: Array, w: Array) -> Reference:
        """Loss, and the gradient of each trained tensor."""
        ...


@dataclass(frozen=True)
class Proof:
    """What was compared with whom, and the largest relative error found."""

    oracle: str
    batches: tuple[int, ...]
    max_relative_error: float


def prove(
    program_id: str,
    gradients: ir.Model,
    trainables: Sequence[Trainable],
    effective: Effective,
    oracle: Oracle,
    x: Array,
    y: Array,
    seed: int,
) -> Proof:
    """Compare the `gradients` graph with the oracle on rows of the example. Raises `ProofFailed` naming tensor and error."""
    draw = np.random.Generator(np.random.Philox(key=seed))
    session = onnxruntime.InferenceSession(
        ir.to_proto(gradients).SerializeToString(), _one_thread(), providers=["CPUExecutionProvider"]
    )
    outputs = [value.name for value in session.get_outputs()]
    worst = 0.0
    for size in BATCHES:
        rows = draw.integers(0, len(x), size)
        w = draw.uniform(0.5, 1.5, size).astype(np.float32)
        trained = {t.name: _moved(t.value, draw) for t in trainables}
        feeds = {"d.x": x[rows], "d.y": y[rows], "d.w": w, **{f"p.{name}": value for name, value in trained.items()}}
        found = dict(zip(outputs, session.run(outputs, feeds), strict=True))
        reference = oracle(trained, effective, x[rows], y[rows], w)
        loss_off = abs(float(found["loss"].ravel()[0]) - reference.loss)
        errors = {"the loss": loss_off / max(abs(reference.loss), _SMALL_LOSS)}
        largest = max(float(np.nanmax(np.abs(value))) for value in reference.gradients.values())
        for name, expected in reference.gradients.items():
            errors[f"the gradient of {name}"] = relative_error(
                found[f"grad.{name}"], expected, largest, reference.rounding[name]
            )
        where = max(errors, key=lambda name: errors[name] if np.isfinite(errors[name]) else np.inf)
        if not errors[where] <= TOLERANCE:
            raise ProofFailed(
                f"{program_id}: {where} differs from {oracle.name} by {errors[where]:.2g} relative at batch {size}, "
                f"at most {TOLERANCE:g} is allowed: nothing was written; please report the model"
            )
        worst = max(worst, errors[where])
    return Proof(oracle.name, BATCHES, worst)


def relative_error(found: Array, expected: Array, largest: float, forgiven: float = 0.0) -> float:
    """max|found - expected| beyond what is forgiven, over the size of the tensor's gradient; NaN in `expected`: unknown.

    A gradient that is zero by structure, as that of the bias of attention keys, is rounding noise: no tensor counts as
    smaller than a thousandth of the `largest` gradient of all.
    """
    known = ~np.isnan(expected)
    off = max(0.0, float(np.abs(found - expected)[known].max()) - 2 * forgiven)
    scale = max(float(np.abs(found).max()), float(np.abs(expected[known]).max()), _SMALLEST * largest)
    return off / scale if scale else 0.0


def _moved(value: Array, draw: np.random.Generator) -> Array:
    spread = max(float(value.std()), 0.05)
    return (value + draw.normal(0, spread / 2, value.shape)).astype(np.float32)


def _one_thread() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry(*FLOAT_PRODUCTS)
    return options


class CentralDifferences:
    """(loss(p + h) - loss(p - h)) / 2h in float64, for the coordinates with the largest gradients and some at random.

    `loss` is the graph of `step_graph.loss_graph`; `gradients` says which coordinates are large, nothing more.
    """

    name = "central differences"

    def __init__(self, loss: ir.Model, gradients: ir.Model, seed: int) -> None:
        self._loss = evaluator(loss)
        self._gradients = onnxruntime.InferenceSession(
            ir.to_proto(gradients).SerializeToString(), _one_thread(), providers=["CPUExecutionProvider"]
        )
        self._draw = np.random.Generator(np.random.Philox(key=seed))

    def __call__(
        self,
        trained: Mapping[str, Array],
        effective: Effective,  # noqa: ARG002 - the graph holds the same function
        x: Array,
        y: Array,
        w: Array,
    ) -> Reference:
        """Loss and gradients; coordinates that were not looked at are NaN."""
        feeds = {"d.x": x, "d.y": y, "d.w": w, **{f"p.{name}": value for name, value in trained.items()}}
        names = [f"grad.{name}" for name in trained]
        large = dict(zip(trained, self._gradients.run(names, feeds), strict=True))
        doubles = {name: v.astype(np.float64) if v.dtype == np.float32 else v for name, v in feeds.items()}
        return Reference(
            self._value(doubles),
            {name: self._differences(doubles, f"p.{name}", self._coordinates(large[name])) for name in trained},
            dict.fromkeys(trained, 0.0),
        )

    def _coordinates(self, gradient: Array) -> Array:
        flat = np.abs(gradient).ravel()
        random = self._draw.integers(0, flat.size, min(_RANDOM, flat.size))
        return np.unique(np.concatenate([np.argsort(flat)[-_LARGEST:], random]))

    def _differences(self, feeds: Mapping[str, Array], name: str, coordinates: Array) -> Array:
        result = np.full(feeds[name].shape, np.nan)
        for index in coordinates:
            place = np.unravel_index(int(index), result.shape)
            sides = []
            for sign in (1, -1):
                moved = feeds[name].copy()
                moved[place] += sign * _STEP
                sides.append(self._value({**feeds, name: moved}))
            result[place] = (sides[0] - sides[1]) / (2 * _STEP)
        return result

    def _value(self, feeds: Mapping[str, Array]) -> float:
        return float(np.ravel(self._loss.run(["loss"], dict(feeds))[0])[0])  # type: ignore[index]


class Erf(OpRun):
    """The error function in float64: ONNX's reference evaluator computes it in float32."""

    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        return (_erf(x),)


class Gelu(OpRun):
    """x times the normal distribution, for the same reason; its tanh form is an approximation by definition."""

    op_domain = ""

    def _run(self, x: Array, approximate: str = "none") -> tuple[Array]:
        if approximate == "tanh":
            return (x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),)
        return (x * 0.5 * (1 + _erf(x * math.sqrt(0.5))),)


def _erf(x: Array) -> Array:
    value: Array = np.vectorize(math.erf, otypes=[np.float64])(x)
    return value.astype(x.dtype)


def evaluator(model: ir.Model) -> ReferenceEvaluator:
    """The graph in float64, to be run by ONNX's own definitions of the operators."""
    return ReferenceEvaluator(to_double(ir.to_proto(model)), new_ops=[Erf, Gelu])


def to_double(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph in float64; dequantized constants become plain ones."""
    double = onnx.TensorProto.DOUBLE
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "DequantizeLinear"]:
        codes, scales = values[node.input[0]], values[node.input[1]]
        axis = next(held.i for held in node.attribute if held.name == "axis")
        shape = [-1 if i == axis else 1 for i in range(codes.ndim)]
        values[node.output[0]] = codes.astype(np.float32) * scales.reshape(shape)
        graph.node.remove(node)
    del graph.initializer[:]
    for name, value in values.items():
        wide = value.astype(np.float64) if value.dtype == np.float32 else value
        graph.initializer.append(numpy_helper.from_array(wide, name))
    for entry in [*graph.input, *graph.output]:
        if entry.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            entry.type.tensor_type.elem_type = double
    del graph.value_info[:]
    for node in graph.node:
        for held in node.attribute:
            if node.op_type == "Cast" and held.name == "to" and held.i == onnx.TensorProto.FLOAT:
                held.i = double
    return result
