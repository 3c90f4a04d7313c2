"""LSTM and GRU unrolled: the runtime's own kernel as the reference of the values, torch's as that of the gradients."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from export.decompose import decompose
from export.errors import NoGradientRule
from export.gradients import differentiate
from export.graph import IR_VERSION, OPSET, Builder, clone, tidy
from export.shapes import BATCH, infer_shapes

T, INPUTS, H = 5, 3, 4
GATES = {"LSTM": 4, "GRU": 3}


def layer(op_type: str, direction: str, **attributes) -> tuple[ir.Model, Builder, list[ir.Value], tuple[ir.Value, ...]]:
    """The operator on x, W, R, B (and initial states where `initial` is set), all of them inputs."""
    batch_first, initial = attributes.get("layout", 0), attributes.pop("initial", True)
    count, gates = 2 if direction == "bidirectional" else 1, GATES[op_type]
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="rule"), ir_version=IR_VERSION)
    b = Builder(model.graph)
    state = (BATCH, count, H) if batch_first else (count, BATCH, H)
    shapes = {
        "x": (BATCH, T, INPUTS) if batch_first else (T, BATCH, INPUTS),
        "w": (count, gates * H, INPUTS),
        "r": (count, gates * H, H),
        "b": (count, 2 * gates * H),
        **({"h": state} if initial else {}),
        **({"c": state} if initial and op_type == "LSTM" else {}),
    }
    inputs = [b.input(name, "float32", shape) for name, shape in shapes.items()]
    operands = [*inputs[:4], None, *inputs[4:]] if initial else inputs
    outputs = b.ops(3 if op_type == "LSTM" else 2, op_type, *operands, hidden_size=H, direction=direction, **attributes)
    infer_shapes(model)
    for output, name in zip(outputs, ("y", "y_h", "y_c"), strict=False):
        output.name = name
        model.graph.outputs.append(output)
    return model, b, inputs, outputs


def run(model: ir.Model, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options).run(names, feeds)


def feeds_for(inputs: list[ir.Value], batch: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        str(value.name): draw.normal(0, 0.6, [s if isinstance(s, int) else batch for s in value.shape]).astype(
            np.float32
        )
        for value in inputs
    }


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(
    ("op_type", "attributes"),
    [
        ("LSTM", {}),
        ("LSTM", {"initial": False}),
        ("GRU", {"linear_before_reset": 0}),
        ("GRU", {"linear_before_reset": 1, "initial": False}),
    ],
)
def test_unrolled_it_gives_what_the_operator_gives(op_type: str, attributes: dict, direction: str) -> None:
    model, b, inputs, outputs = layer(op_type, direction, **attributes)
    whole = clone(model)
    loss = None
    for output in outputs:
        part = b.op("ReduceSum", b.op("Mul", output, output), keepdims=0)
        loss = part if loss is None else b.op("Add", loss, part)
    decompose(b, loss, inputs)
    assert op_type not in {node.op_type for node in model.graph}
    tidy(model)
    names = ["y", "y_h", "y_c"][: len(outputs)]
    for batch in (1, 3):
        feeds = feeds_for(inputs, batch)
        for found, expected in zip(run(model, names, feeds), run(whole, names, feeds), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_gradients_equal_those_of_torch(kind: str, direction: str) -> None:
    both = direction == "bidirectional"
    module = getattr(nn, kind)(INPUTS, H, bidirectional=both)
    model, b, inputs, outputs = layer(
        kind, direction, initial=False, **({"linear_before_reset": 1} if kind == "GRU" else {})
    )
    loss = b.op("ReduceSum", b.op("Mul", outputs[0], outputs[0]), keepdims=0, name="loss")
    model.graph.outputs.clear()
    decompose(b, loss, inputs)
    for value, gradient in differentiate(b, loss, inputs).items():
        model.graph.outputs.append(b.op("Identity", gradient, name=f"grad.{value.name}"))
    tidy(model)
    feeds = feeds_for(inputs, 3)
    # torch's gates are i, f, g, o and r, z, n; ONNX's are i, o, f, c and z, r, h.
    order = [0, 2, 3, 1] if kind == "LSTM" else [1, 0, 2]
    leaves = [torch.tensor(feeds[name], requires_grad=True) for name in ("x", "w", "r", "b")]
    tensors = {}
    for number in range(2 if both else 1):
        suffix = "_l0" + ("_reverse" if number else "")
        for name, value in (("weight_ih", leaves[1]), ("weight_hh", leaves[2])):
            tensors[name + suffix] = torch.cat([value[number].chunk(GATES[kind])[i] for i in order])
        halves = leaves[3][number].chunk(2)
        for name, half in zip(("bias_ih", "bias_hh"), halves, strict=True):
            tensors[name + suffix] = torch.cat([half.chunk(GATES[kind])[i] for i in order])
    y, _ = torch.func.functional_call(module, tensors, (leaves[0],))
    expected = torch.autograd.grad((y**2).sum(), leaves)
    found = run(model, [f"grad.{name}" for name in ("x", "w", "r", "b")], feeds)
    for gradient, reference in zip(found, expected, strict=True):
        assert np.abs(gradient - reference.numpy()).max() <= 1e-5 * float(reference.abs().max())


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_batch_first_only_turns_the_axes(kind: str) -> None:
    turned, b, inputs, outputs = layer(kind, "bidirectional", layout=1)
    loss = b.op("ReduceSum", outputs[0], keepdims=0)
    decompose(b, loss, inputs)
    tidy(turned)
    plain, _, other, _ = layer(kind, "bidirectional")
    feeds = feeds_for(inputs, 3)
    swapped = {n: v if n in "wrb" else v.transpose(1, 0, 2) for n, v in feeds.items()}
    assert set(swapped) == {str(value.name) for value in other}
    y, y_h = run(turned, ["y", "y_h"], feeds)
    expected, expected_h = run(plain, ["y", "y_h"], swapped)
    np.testing.assert_allclose(y, expected.transpose(2, 0, 1, 3), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y_h, expected_h.transpose(1, 0, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("op_type", "attributes"),
    [
        ("LSTM", {"clip": 3.0}),
        ("LSTM", {"input_forget": 1}),
        ("LSTM", {"activations": ["Sigmoid", "Relu", "Tanh"]}),
        ("GRU", {"activations": ["HardSigmoid", "Tanh"]}),
    ],
)
def test_what_is_not_covered_is_no_wrong_gradient(op_type: str, attributes: dict) -> None:
    _, b, inputs, outputs = layer(op_type, "forward", **attributes)
    loss = b.op("ReduceSum", outputs[0], keepdims=0)
    decompose(b, loss, inputs)
    with pytest.raises(NoGradientRule, match=op_type):
        differentiate(b, loss, inputs)


def test_a_long_sequence_is_not_unrolled() -> None:
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="rule"), ir_version=IR_VERSION)
    b = Builder(model.graph)
    x, w = b.input("x", "float32", (65, BATCH, INPUTS)), b.input("w", "float32", (1, 3 * H, INPUTS))
    y = b.ops(1, "GRU", x, w, np.ones((1, 3 * H, H), np.float32), hidden_size=H)[0]
    loss = b.op("ReduceSum", y, keepdims=0)
    decompose(b, loss, [w])
    with pytest.raises(NoGradientRule, match="at most 64 steps"):
        differentiate(b, loss, [w])
