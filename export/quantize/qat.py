"""Quantization-aware training of the very graph that is deployed: an interpreter of QDQ graphs in torch.

The runtime's tool has placed the quantizers (`ptq`); this module runs that graph with straight-through rounding and
learnable scales (in logarithm; LSQ, Esser et al., arXiv 1902.08153), trains weights, biases and scales, and writes them
back into the same initializers. Training and deployment share one graph, so the placement cannot differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx
import torch
from onnx import helper
from torch.nn import functional

from edge_sdk.fields import INPUT
from edge_sdk.tensors import Array
from export.errors import ExportError
from export.quantize.ptq import IntegerModel
from export.quantize.settings import QatSettings
from export.quantize.weights import levels

_CODES: Final = 255
_MOST: Final = 2.0**31 - 1


def train(
    model: onnx.ModelProto,
    floats: Mapping[str, Array],
    x: Array,
    y: Array,
    *,
    bits: int,
    classifies: bool = True,
    settings: QatSettings | None = None,
) -> None:
    """Train the QDQ graph in place on x `[n, *shape]`, y labels int64 `[n]` or targets float32.

    `floats`: weights and biases of the float model by name, where training starts. Raises `ExportError` naming a node
    whose operator the interpreter does not have.
    """
    settings = settings or QatSettings()
    network = FakeQuantizedGraph(model, floats, bits)
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(settings.steps, 1))
    draw = np.random.Generator(np.random.Philox(key=settings.seed))
    for _ in range(settings.steps):
        rows = draw.integers(0, len(x), min(settings.batch, len(x)))
        output = network(torch.as_tensor(x[rows]))
        target = torch.as_tensor(y[rows])
        loss = functional.cross_entropy(output, target) if classifies else functional.mse_loss(output, target)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    network.write_back()


class FakeQuantizedGraph(torch.nn.Module):
    """A QDQ graph as a torch function with parameters: float weights and biases, and logarithms of all scales."""

    def __init__(self, model: onnx.ModelProto, floats: Mapping[str, Array], bits: int) -> None:
        super().__init__()
        self._held, self._bits = IntegerModel.read(model), bits
        held = self._held.tensors()
        self._constants = {name: torch.as_tensor(np.array(value)) for name, value in held.items()}
        self._weights = {q.codes: q for q in self._held.weights}
        self._biases = {q.codes: q for q in self._held.biases}
        self._parameters_of: dict[str, torch.nn.Parameter] = {}
        for q in (*self._held.weights, *self._held.biases):
            self._add(q.name, q.of(floats))
        for name in (*(q.scale for q in self._held.weights), *(q.scale for q in self._held.activations)):
            self._add(name, np.log(held[name]))
        self._nodes = list(model.graph.node)
        unknown = [node for node in self._nodes if node.op_type not in (*_OPERATORS, *_QUANTIZERS)]
        if unknown:
            found = ", ".join(f"{node.op_type} (node {node.name!r})" for node in unknown)
            raise ExportError(
                f"quantization-aware training does not know {found}; it knows {', '.join(sorted(_OPERATORS))}: "
                "quantize this model without training (qat_steps = 0)"
            )
        self._output = model.graph.output[0].name

    def _add(self, name: str, value: Array) -> None:
        parameter = torch.nn.Parameter(torch.as_tensor(np.array(value, np.float32)))
        self.register_parameter(f"p{len(self._parameters_of)}", parameter)
        self._parameters_of[name] = parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output of the graph for `[n, *shape]`."""
        values: dict[str, torch.Tensor] = {INPUT: x, **self._constants}
        origin: dict[str, str] = {}  # of the codes that a Cast hands on
        for node in self._nodes:
            given = [values[name] if name else None for name in node.input]
            if node.op_type == "Cast":
                origin[node.output[0]] = node.input[0]
                result: torch.Tensor | None = given[0]
            elif node.op_type == "QuantizeLinear":
                result = self._activation(node)(given)
            elif node.op_type == "DequantizeLinear":
                result = self._dequantized(origin.get(node.input[0], node.input[0]), given)
            else:
                attributes = {held.name: helper.get_attribute_value(held) for held in node.attribute}
                result = _OPERATORS[node.op_type](given, attributes)
            assert result is not None
            values[node.output[0]] = result
        return values[self._output]

    def _activation(self, node: onnx.NodeProto) -> Callable[[Sequence[Any]], torch.Tensor]:
        scale, zero_point = self._scale(node.input[1]), self._constants[node.input[2]].float()

        def quantize(given: Sequence[Any]) -> torch.Tensor:
            codes = _round(given[0] / scale) + zero_point
            return (torch.clamp(codes, 0, _CODES) - zero_point) * scale

        return quantize

    def _dequantized(self, codes: str, given: Sequence[Any]) -> torch.Tensor:
        if codes in self._weights:
            q = self._weights[codes]
            weight, most = self._parameters_of[q.name], levels(self._bits)
            scale = self._scale(q.scale).reshape([-1 if i == q.axis else 1 for i in range(weight.ndim)])
            return torch.clamp(_round(weight / scale), -most, most) * scale
        if codes in self._biases:
            q = self._biases[codes]
            assert q.inputs is not None
            scale = (self._scale(q.inputs[0]) * self._scale(q.inputs[1])).detach()
            return torch.clamp(_round(self._parameters_of[q.name] / scale), -_MOST, _MOST) * scale
        return torch.as_tensor(given[0])  # already the values of an activation

    def _scale(self, name: str) -> torch.Tensor:
        return self._parameters_of[name].exp()

    def write_back(self) -> None:
        """Write what was learned into the graph's initializers."""
        learned = {name: value.detach().numpy() for name, value in self._parameters_of.items()}
        tensors = self._held.tensors()
        self._held.write(
            {q.name: learned[q.name] for q in self._held.weights},
            {q.name: np.exp(learned[q.scale]) for q in self._held.weights},
            {q.name: learned[q.name] for q in self._held.biases},
            {
                q.scale: (np.float32(np.exp(learned[q.scale])), int(tensors[q.zero_point]))
                for q in self._held.activations
            },
            self._bits,
        )


class _Round(torch.autograd.Function):
    """Rounding whose gradient is the identity."""

    @staticmethod
    def forward(_context: Any, value: torch.Tensor) -> torch.Tensor:
        return torch.round(value)

    @staticmethod
    def backward(_context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def _round(value: torch.Tensor) -> torch.Tensor:
    rounded: torch.Tensor = _Round.apply(value)  # type: ignore[no-untyped-call]
    return rounded


def _padded(x: torch.Tensor, attributes: Mapping[str, Any], value: float = 0.0) -> torch.Tensor:
    pads = list(attributes.get("pads", ()))
    if not any(pads):
        return x
    half = len(pads) // 2
    sides = [side for axis in reversed(range(half)) for side in (pads[axis], pads[axis + half])]
    return functional.pad(x, sides, value=value)


def _conv(given: Sequence[Any], attributes: Mapping[str, Any]) -> torch.Tensor:
    x, weight, bias = given[0], given[1], given[2] if len(given) > 2 else None
    function = {3: functional.conv1d, 4: functional.conv2d}[weight.ndim]
    rank = weight.ndim - 2
    result: torch.Tensor = function(
        _padded(x, attributes),
        weight,
        bias,
        tuple(attributes.get("strides", [1] * rank)),
        0,
        tuple(attributes.get("dilations", [1] * rank)),
        attributes.get("group", 1),
    )
    return result


def _gemm(given: Sequence[Any], attributes: Mapping[str, Any]) -> torch.Tensor:
    a = given[0].T if attributes.get("transA") else given[0]
    b = given[1].T if attributes.get("transB") else given[1]
    product: torch.Tensor = attributes.get("alpha", 1.0) * (a @ b)
    return product if len(given) < 3 or given[2] is None else product + attributes.get("beta", 1.0) * given[2]


def _max_pool(given: Sequence[Any], attributes: Mapping[str, Any]) -> torch.Tensor:
    kernel = tuple(attributes["kernel_shape"])
    function = functional.max_pool1d if len(kernel) == 1 else functional.max_pool2d
    x = _padded(given[0], attributes, float("-inf"))
    return function(x, kernel, tuple(attributes.get("strides", [1] * len(kernel))))


def _average_pool(given: Sequence[Any], attributes: Mapping[str, Any]) -> torch.Tensor:
    kernel, pads = tuple(attributes["kernel_shape"]), list(attributes.get("pads", ()))
    function: Any = functional.avg_pool1d if len(kernel) == 1 else functional.avg_pool2d
    sides = tuple(pads[: len(kernel)]) or (0,) * len(kernel)
    result: torch.Tensor = function(
        given[0],
        kernel,
        tuple(attributes.get("strides", [1] * len(kernel))),
        sides,
        count_include_pad=bool(attributes.get("count_include_pad", 0)),
    )
    return result


def _mean(given: Sequence[Any], attributes: Mapping[str, Any]) -> torch.Tensor:
    result: torch.Tensor = given[0].mean(tuple(given[1].tolist()), keepdim=bool(attributes.get("keepdims", 1)))
    return result


def _reshape(given: Sequence[Any], _attributes: Mapping[str, Any]) -> torch.Tensor:
    x = given[0]
    sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(given[1].tolist())]
    result: torch.Tensor = x.reshape(sizes)
    return result


def _squeeze(given: Sequence[Any], _attributes: Mapping[str, Any]) -> torch.Tensor:
    result: torch.Tensor = given[0].squeeze(tuple(given[1].tolist()))
    return result


def _unsqueeze(given: Sequence[Any], _attributes: Mapping[str, Any]) -> torch.Tensor:
    x: torch.Tensor = given[0]
    for axis in sorted(given[1].tolist()):
        x = x.unsqueeze(axis)
    return x


def _clip(given: Sequence[Any], _attributes: Mapping[str, Any]) -> torch.Tensor:
    low, high = (given[i] if len(given) > i else None for i in (1, 2))
    return torch.clamp(given[0], low, high)


_Operator = Callable[[Sequence[Any], Mapping[str, Any]], torch.Tensor]
_QUANTIZERS: Final = ("QuantizeLinear", "DequantizeLinear", "Cast")
_OPERATORS: Final[Mapping[str, _Operator]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": lambda given, _: given[0] @ given[1],
    "Add": lambda given, _: given[0] + given[1],
    "Sub": lambda given, _: given[0] - given[1],
    "Mul": lambda given, _: given[0] * given[1],
    "Relu": lambda given, _: torch.relu(given[0]),
    "Clip": _clip,
    "Tanh": lambda given, _: torch.tanh(given[0]),
    "Sigmoid": lambda given, _: torch.sigmoid(given[0]),
    "Gelu": lambda given, held: functional.gelu(given[0], approximate=held.get("approximate", b"none").decode()),
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda given, _: given[0].mean(tuple(range(2, given[0].ndim)), keepdim=True),
    "ReduceMean": _mean,
    "Flatten": lambda given, _: given[0].flatten(1),
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": lambda given, held: given[0].permute(*held["perm"]),
    "Identity": lambda given, _: given[0],
}
