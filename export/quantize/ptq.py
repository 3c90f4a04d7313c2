"""Post-training quantization: the runtime's own tool places QuantizeLinear and DequantizeLinear, we fill in the numbers.

onnxruntime knows best which placement its kernels fuse. What it makes is a plain ONNX graph (QDQ) with unsigned 8-bit
activations and int8 weights per output channel; `IntegerModel` reads the quantizers of such a graph and writes new
numbers into the same initializers: fewer bits, or what quantization-aware training has learned.

Weights of at most 4 bits are stored as int4 and cast to int8 in the graph: the runtime folds the cast when it loads the
file, so the kernels stay those of int8 and the file has half the size. (A DequantizeLinear of int4 itself leaves a
convolution in float.)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
from onnxruntime.quantization.calibrate import TensorsData

from edge_sdk.tensors import Array
from export.graph import IR_VERSION, array_of
from export.quantize.calibration import parsed
from export.quantize.weights import levels

# What the runtime has integer kernels for, and what passes codes through.
OPERATORS: Final = ("Conv", "Gemm", "MatMul", "Add", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool",
                    "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose")  # fmt: skip
_PACKED: Final = 4  # bits from which on weights are stored as int4


def to_integers(
    model: ir.Model,
    ranges: Mapping[str, tuple[float, float]],
    *,
    bits: int = 8,
    signed: bool = False,
) -> onnx.ModelProto:
    """The forward graph in integers, for activations of these `ranges` (tensor -> low, high).

    `signed`: int8 activations, which leave residual networks partly in float on x86.
    """
    source = parsed(model)
    bounds = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
    quantizer = QDQQuantizer(
        source,
        True,
        False,
        QuantType.QInt8,
        QuantType.QInt8 if signed else QuantType.QUInt8,
        TensorsData(CalibrationMethod.MinMax, bounds),
        None,
        [],
        list(OPERATORS),
        {"ActivationSymmetric": signed, "WeightSymmetric": True},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    made: onnx.ModelProto = quantizer.model.model
    if bits < 8:
        held = IntegerModel.read(made)
        floats = {n: array for n, value in model.graph.initializers.items() if (array := array_of(value)) is not None}
        weights = {q.name: q.of(floats) for q in held.weights}
        scales = {q.name: _scales(weights[q.name], q.axis, bits) for q in held.weights}
        held.write(weights, scales, {q.name: q.of(floats) for q in held.biases}, {}, bits)
    return made


def _scales(weight: Array, axis: int, bits: int) -> Array:
    largest = np.abs(weight).max(axis=tuple(i for i in range(weight.ndim) if i != axis)) / levels(bits)
    return np.where(largest > 0, largest, 1).astype(np.float32)


@dataclass(frozen=True)
class Quantizer:
    """Names of initializers: the codes of a constant (empty for an activation), scale, zero point; axis of the scales.

    `name`: the tensor in float. `inputs`: of a bias, the scales of activation and weight whose product is its own.
    """

    name: str
    codes: str
    scale: str
    zero_point: str
    axis: int = 0
    inputs: tuple[str, str] | None = None

    def of(self, tensors: Mapping[str, Array]) -> Array:
        """This tensor among those of the float model."""
        return tensors[self.name]


@dataclass(frozen=True)
class IntegerModel:
    """The quantizers of a QDQ graph: of its weights, its biases and its activations."""

    model: onnx.ModelProto
    weights: tuple[Quantizer, ...]
    biases: tuple[Quantizer, ...]
    activations: tuple[Quantizer, ...]

    @classmethod
    def read(cls, model: onnx.ModelProto) -> IntegerModel:
        """Find them by the types of what DequantizeLinear reads."""
        types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        ranks = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
        makers = {output: node for node in model.graph.node for output in node.output}
        users = {name: node for node in model.graph.node for name in node.input}
        weights, biases, activations = [], [], []
        for node in model.graph.node:
            if node.op_type == "QuantizeLinear":
                activations.append(Quantizer(node.input[1].removesuffix("_scale"), "", node.input[1], node.input[2]))
            if node.op_type != "DequantizeLinear":
                continue
            codes = _behind_cast(node.input[0], makers)
            axis = next((held.i for held in node.attribute if held.name == "axis"), 1)
            zero_point = node.input[2] if len(node.input) > 2 else ""
            if types.get(codes) in (TensorProto.INT8, TensorProto.INT4) and ranks[codes] > 1:
                weights.append(Quantizer(_stem(codes), codes, node.input[1], zero_point, axis))
            elif types.get(codes) == TensorProto.INT32:
                layer = users[node.output[0]]
                inputs = tuple(makers[name].input[1] for name in layer.input[:2])
                biases.append(Quantizer(_stem(codes), codes, node.input[1], zero_point, 0, (inputs[0], inputs[1])))
        unique = {q.scale: q for q in reversed(activations)}  # a pooling shares the scale of what enters it
        return cls(model, tuple(weights), tuple(biases), tuple(unique.values()))

    def tensors(self) -> dict[str, Array]:
        """Every initializer by name; int4 as int8."""
        return {
            tensor.name: numpy_helper.to_array(tensor).astype(np.int8)
            if tensor.data_type == TensorProto.INT4
            else numpy_helper.to_array(tensor)
            for tensor in self.model.graph.initializer
        }

    def write(
        self,
        weights: Mapping[str, Array],
        scales: Mapping[str, Array],
        biases: Mapping[str, Array],
        activations: Mapping[str, tuple[np.float32, int]],
        bits: int,
    ) -> None:
        """New numbers, in place: float weights and biases by name, scales of the weights, scale and zero point by name of
        the activations' scale (those that are absent stay)."""
        new: dict[str, Array] = {}
        current = self.tensors()
        for q in self.activations:
            if q.scale in activations:
                number, zero_point = activations[q.scale]
                new[q.scale] = np.array(number, np.float32)
                new[q.zero_point] = np.array(zero_point, current[q.zero_point].dtype)
        most = levels(bits)
        for q in self.weights:
            scale = scales[q.name].astype(np.float32)
            column = [-1 if i == q.axis else 1 for i in range(weights[q.name].ndim)]
            new[q.scale] = scale
            new[q.codes] = np.rint(weights[q.name] / scale.reshape(column)).clip(-most, most).astype(np.int8)
        current |= new
        for q in self.biases:
            assert q.inputs is not None
            scale = (current[q.inputs[0]] * current[q.inputs[1]]).astype(np.float32)
            limit = 2**31 - 1
            new[q.scale] = scale
            new[q.codes] = np.rint(biases[q.name] / scale.astype(np.float64)).clip(-limit, limit).astype(np.int32)
        for tensor in self.model.graph.initializer:
            if tensor.name in new:
                tensor.CopyFrom(numpy_helper.from_array(new[tensor.name], tensor.name))
        if bits <= _PACKED:
            self._pack({q.codes for q in self.weights})

    def _pack(self, names: set[str]) -> None:
        graph = self.model.graph
        cast = {node.input[0] for node in graph.node if node.op_type == "Cast"}
        for tensor in graph.initializer:
            if tensor.name not in names:
                continue
            codes = numpy_helper.to_array(tensor)
            packed = helper.make_tensor(tensor.name, TensorProto.INT4, codes.shape, codes.ravel().tolist())
            tensor.CopyFrom(packed)
            if tensor.name in cast:
                continue
            wide = f"{tensor.name}/int8"
            for node in graph.node:
                node.input[:] = [wide if name == tensor.name else name for name in node.input]
            graph.node.insert(0, helper.make_node("Cast", [tensor.name], [wide], to=TensorProto.INT8))


def _behind_cast(name: str, makers: Mapping[str, onnx.NodeProto]) -> str:
    node = makers.get(name)
    return str(node.input[0]) if node is not None and node.op_type == "Cast" else name


def _stem(codes: str) -> str:
    return codes.removesuffix("_quantized")


def stripped(model: onnx.ModelProto, kept_names: Mapping[str, str] | None = None) -> bytes:
    """The file to flash: short names but for inputs and outputs, and nothing that the runtime does not read.

    `kept_names`: initializers that stay apart, and what they are called.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    kept = {value.name for value in (*graph.input, *graph.output)}
    named = dict(kept_names or {})
    short: dict[str, str] = {"": "", **named}

    def name_of(name: str) -> str:
        if name in kept:
            return name
        return short.setdefault(name, f"{len(short):x}")

    _merge_equal(graph, named)
    for tensor in graph.initializer:
        tensor.name, tensor.doc_string = name_of(tensor.name), ""
    for node in graph.node:
        node.input[:] = [name_of(name) for name in node.input]
        node.output[:] = [name_of(name) for name in node.output]
        node.name, node.doc_string = "", ""
        del node.metadata_props[:]
    for value in (*graph.input, *graph.output):
        value.doc_string = ""
        del value.metadata_props[:]
    del graph.value_info[:], graph.metadata_props[:], made.metadata_props[:], made.functions[:]
    graph.name, graph.doc_string, made.doc_string, made.producer_version = "g", "", "", ""
    made.producer_name, made.ir_version = "edgewise", IR_VERSION
    opset = next(entry.version for entry in made.opset_import if entry.domain in ("", "ai.onnx"))
    del made.opset_import[:]
    made.opset_import.append(helper.make_opsetid("", opset))
    onnx.checker.check_model(made)
    content: bytes = made.SerializeToString(deterministic=True)
    return content


def _merge_equal(graph: onnx.GraphProto, apart: Collection[str]) -> None:
    """Scales and zero points are written once."""
    first: dict[bytes, str] = {}
    same: dict[str, str] = {}
    for tensor in list(graph.initializer):
        bare = onnx.TensorProto()
        bare.CopyFrom(tensor)
        bare.name = ""
        key = bare.SerializeToString(deterministic=True)
        if tensor.name in apart:
            continue
        if key in first:
            same[tensor.name] = first[key]
            graph.initializer.remove(tensor)
        else:
            first[key] = tensor.name
    for node in graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
