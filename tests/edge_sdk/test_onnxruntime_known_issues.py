"""What we know of ONNX Runtime and work around (step-graphs.md, section 6): each noticed here when it changes.

Each is looked at on the oldest runtime and on the newest. A test that fails says that a behaviour changed, perhaps for the
better: then see whether what we do about it is still needed. The crash of some versions at import under an emulated arm64
processor cannot be provoked without that emulator; the range in pyproject.toml is the answer to it.
"""

from __future__ import annotations

import json
import platform
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edge_sdk.bundle import Bundle
from edge_sdk.errors import BundleError
from edge_sdk.runtime import RuntimeProfile, Stepper, open_session
from export import torch_import
from export.writer import write_archive
from tests.environments import python_of, run
from tests.tiny_bundle import HEAD, tiny_bundle, tiny_data

PROBE = Path(__file__).with_name("runtime_probe.py")
SCALE = np.float32(0.05)
INT8_ALLOWED = "session.qdqisint8allowed"
x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have other kernels")


@pytest.fixture(scope="session", params=["oldest", "newest"])
def python(request: pytest.FixtureRequest) -> Path:
    return python_of(".venv-oldest") if request.param == "oldest" else Path(sys.executable)


class Graph:
    """Nodes and constants of a test graph; every method returns the name of a value."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, to: str | None = None, **attributes: Any) -> str:
        name = to or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def const(self, value: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), f"k{len(self.constants)}"))
        return self.constants[-1].name

    def quantized(self, value: str, dtype: type[np.integer[Any]]) -> str:
        """Through integers and back, as an activation."""
        scale, zero = self.const(SCALE), self.const(np.asarray(0 if dtype is np.int8 else 128, dtype))
        return self.op("DequantizeLinear", self.op("QuantizeLinear", value, scale, zero), scale, zero)

    def weight(self, shape: tuple[int, ...]) -> str:
        """int8 codes, one scale for each output channel."""
        codes = np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)
        scales, zeros = np.full(shape[0], 0.002, np.float32), np.zeros(shape[0], np.int8)
        return self.op("DequantizeLinear", self.const(codes), self.const(scales), self.const(zeros), axis=0)

    def save(self, path: Path, inputs: dict[str, list[Any]], outputs: dict[str, list[Any]]) -> Path:
        rows = [
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in values.items()]
            for values in (inputs, outputs)
        ]
        graph = helper.make_graph(self.nodes, "probe", *rows, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(model)
        onnx.save(model, path)
        return path


def opened(python: Path, path: Path, *entries: str) -> onnx.ModelProto:
    """What the runtime makes of a graph that it accepts."""
    optimized = path.with_suffix(".optimized")
    assert run(python, PROBE, path, optimized, *entries).strip() == ""
    return onnx.load(optimized)


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def training_graph(path: Path, dtype: type[np.integer[Any]]) -> Path:
    """Two layers with quantized activations, and the gradients of their weights, which read those activations transposed."""
    g = Graph()
    x = g.quantized("d.x", dtype)
    hidden = g.quantized(g.op("Add", g.op("MatMul", x, g.weight((8, 4))), "p.first"), dtype)
    g.op("MatMul", hidden, "p.second", to="y")
    g.op("MatMul", g.op("Transpose", hidden, perm=[1, 0]), "dy", to="grad.second")
    back = g.op("MatMul", "dy", g.op("Transpose", "p.second", perm=[1, 0]))
    g.op("MatMul", g.op("Transpose", x, perm=[1, 0]), back, to="grad.weight")
    return g.save(
        path,
        {"d.x": ["batch", 8], "dy": ["batch", 3], "p.first": [4], "p.second": [4, 3]},
        {"y": ["batch", 3], "grad.second": [4, 3], "grad.weight": [8, 4]},
    )


def residual_graph(path: Path, dtype: type[np.integer[Any]], *, residual: bool = True) -> Path:
    """Two quantized convolutions, between them the sum of input and first output."""
    g = Graph()
    first = g.quantized("d.x", dtype)
    second = g.quantized(g.op("Conv", first, g.weight((8, 8, 3, 3)), pads=[1, 1, 1, 1]), dtype)
    if residual:
        second = g.quantized(g.op("Add", second, first), dtype)
    third = g.quantized(g.op("Conv", second, g.weight((8, 8, 3, 3)), pads=[1, 1, 1, 1]), dtype)
    g.op("Identity", third, to="y")
    return g.save(path, {"d.x": ["batch", 8, 12, 12]}, {"y": ["batch", 8, 12, 12]})


def activation_dtype(model: onnx.ModelProto) -> int:
    """The type of the zero point that the first QuantizeLinear uses."""
    zero = next(node for node in model.graph.node if node.op_type == "QuantizeLinear").input[2]
    return next(tensor.data_type for tensor in model.graph.initializer if tensor.name == zero)


def test_int8_activations_in_a_training_graph_are_refused_by_the_newest_runtime(tmp_path: Path, python: Path) -> None:
    path = training_graph(tmp_path / "train.onnx", np.int8)
    said = run(python, PROBE, path, tmp_path / "optimized.onnx")
    if python == Path(sys.executable):
        assert "TypeInferenceError" in said
        assert "INT8 does not match y_zero_point type UINT8" in said
    else:
        assert said.strip() == ""


def test_what_we_do_instead_is_accepted(tmp_path: Path, python: Path) -> None:
    opened(python, training_graph(tmp_path / "uint8.onnx", np.uint8))
    opened(python, training_graph(tmp_path / "int8.onnx", np.int8), "session.disable_quant_qdq=1")


@x86
def test_int8_convolutions_behind_a_residual_sum_run_in_float(tmp_path: Path, python: Path) -> None:
    silently = operators(opened(python, residual_graph(tmp_path / "int8.onnx", np.int8)))
    assert (silently["Conv"], silently["QLinearConv"], silently["QLinearAdd"]) == (1, 1, 0)
    ours = operators(opened(python, residual_graph(tmp_path / "uint8.onnx", np.uint8)))
    assert (ours["Conv"], ours["QLinearConv"], ours["QLinearAdd"]) == (0, 2, 1)


@x86
def test_int8_activations_stay_int8_only_where_the_slow_kernels_are_asked_for(tmp_path: Path, python: Path) -> None:
    path = residual_graph(tmp_path / "int8.onnx", np.int8, residual=False)
    assert activation_dtype(opened(python, path)) == TensorProto.UINT8
    allowed = opened(python, path, f"{INT8_ALLOWED}=1")
    assert operators(allowed)["QLinearConv"] == 2
    assert activation_dtype(allowed) == TensorProto.INT8


def test_our_sessions_do_not_ask_for_the_slow_kernels(tmp_path: Path) -> None:
    session = open_session(residual_graph(tmp_path / "int8.onnx", np.int8), RuntimeProfile())
    with pytest.raises(RuntimeError, match="qdqisint8allowed"):
        session.get_session_options().get_session_config_entry(INT8_ALLOWED)


def test_a_product_with_a_dequantized_weight_rounds_its_other_factor_unless_told_not_to(tmp_path: Path) -> None:
    g = Graph()
    draw = np.random.default_rng(0)
    codes, scales = draw.integers(-127, 128, (16, 12)).astype(np.int8), draw.uniform(0.01, 0.02, 12).astype(np.float32)
    g.op("Gemm", "d.x", g.op("DequantizeLinear", g.const(codes), g.const(scales), axis=1), to="y")
    path = g.save(tmp_path / "probe.onnx", {"d.x": ["batch", 16]}, {"y": ["batch", 12]})
    x = draw.normal(size=(3, 16)).astype(np.float32)
    exact = x.astype(np.float64) @ (codes * scales).astype(np.float64)
    by_default = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"d.x": x})[0]
    ours = open_session(path, RuntimeProfile()).run(None, {"d.x": x})[0]
    largest = np.abs(exact).max()
    assert np.abs(by_default - exact).max() > 1e-4 * largest, "the runtime has changed: FLOAT_PRODUCTS may go"
    assert np.abs(ours - exact).max() < 1e-6 * largest


def test_weights_outside_the_folder_of_the_graph_are_refused_by_the_newest_runtime(
    tmp_path: Path, python: Path
) -> None:
    g = Graph()
    g.op("MatMul", "d.x", g.const(np.ones((64, 64), np.float32)), to="y")
    (tmp_path / "graphs").mkdir()
    path = g.save(tmp_path / "graphs" / "probe.onnx", {"d.x": ["batch", 64]}, {"y": ["batch", 64]})
    inline = path.read_bytes()
    for location, reason in (
        ("weights.bin", ""),
        ("../weights.bin", "escapes model directory"),
        (str(tmp_path / "weights.bin"), "Absolute path not allowed"),
    ):
        path.write_bytes(inline)
        _refer_to(path, location)
        said = run(python, PROBE, path, tmp_path / "optimized.onnx").strip()
        if reason and python == Path(sys.executable):
            assert "External data path validation failed" in said
            assert reason in said
        else:  # the oldest reads any file of the machine as a weight: `onnx_wire` refuses the graph before it can
            assert said == ""
        with pytest.raises(BundleError, match="would read"):
            open_session(path, RuntimeProfile())


def _refer_to(path: Path, location: str) -> None:
    """Keep the graph's constant in that file."""
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    (path.parent / location).write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    path.write_bytes(model.SerializeToString())


def test_a_scalar_comes_back_in_the_shape_that_the_graph_gives_it(tmp_path: Path) -> None:
    for name, keepdims, shape in (("none", 0, []), ("one", 1, [1])):
        g = Graph()
        g.op("ReduceSum", "d.x", to="loss", keepdims=keepdims)
        session = open_session(g.save(tmp_path / f"{name}.onnx", {"d.x": ["batch"]}, {"loss": shape}), RuntimeProfile())
        assert session.get_outputs()[0].shape == shape
        assert np.shape(session.run(None, {"d.x": np.ones(3, np.float32)})[0]) == tuple(shape)


def test_a_step_reads_a_loss_of_either_shape(tmp_path: Path) -> None:
    path = tiny_bundle(tmp_path / "tiny.bundle")
    other = _changed(path, tmp_path / "other.bundle", "head_step.onnx", _loss_of_shape_one)
    x, y = tiny_data(20)
    losses = []
    for file in (path, other):
        with Bundle.open(file) as bundle:
            program = bundle.program(HEAD)
            stepper = Stepper(bundle, program, bundle.initial(program))
            losses.append([stepper.step({"d.x": x, "d.y": y}).loss for _ in range(3)])
            stepper.close()
    assert losses[0] == losses[1]


def _loss_of_shape_one(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if "loss" in node.output)
    node.output[0] = "scalar"
    model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "shape_one"))
    model.graph.node.append(helper.make_node("Reshape", ["scalar", "shape_one"], ["loss"]))
    output = next(value for value in model.graph.output if value.name == "loss")
    output.CopyFrom(helper.make_tensor_value_info("loss", TensorProto.FLOAT, [1]))


def _changed(path: Path, target: Path, name: str, change: Callable[[onnx.ModelProto], None]) -> Path:
    """The bundle with one graph changed."""
    with zipfile.ZipFile(path) as archive:
        files = {member: archive.read(member) for member in archive.namelist()}
    manifest = json.loads(files.pop("manifest.json"))
    model = onnx.load_from_string(files[name])
    change(model)
    onnx.checker.check_model(model)
    write_archive(manifest, {**files, name: model.SerializeToString()}, target)
    return target


class Twins(nn.Module):
    """Two normalizations of equal weights, and a layer whose weight is used transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.turned = nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm2(torch.tanh(self.norm1(x)) @ self.turned.weight.T)


def test_the_exporter_of_torch_merges_equal_weights_and_renames_others_but_not_ours() -> None:
    module, x = Twins().eval(), torch.randn(4, 8)
    names = {name for name, _ in module.named_parameters()}
    program = torch.onnx.export(module, (x,), dynamo=True, opset_version=21, verbose=False)
    assert program is not None
    assert names - set(program.model.graph.initializers) == {"norm2.weight", "norm2.bias", "turned.weight"}
    assert names <= set(torch_import.forward_graph(module, x.numpy()).graph.initializers)
