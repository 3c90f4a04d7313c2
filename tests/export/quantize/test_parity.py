"""The interpreter that trains and the runtime that serves compute the same, before training and after (13)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from export.errors import ExportError
from export.graph import array_of
from export.quantize.calibration import calibrate
from export.quantize.ptq import IntegerModel, stripped, to_integers
from export.quantize.qat import FakeQuantizedGraph, train
from export.quantize.settings import QatSettings
from export.quantize.weights import levels
from tests.export.quantize.nets import accuracy, digits, family, graph_of, run, trained


def floats(model: ir.Model) -> dict[str, np.ndarray]:
    return {n: a for n, value in model.graph.initializers.items() if (a := array_of(value)) is not None}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["cnn_all", "conv1d_all", "tiny_resnet8", "tiny_autoencoder"])
def test_the_interpreter_is_within_one_output_step_of_the_runtime(name: str, bits: int) -> None:
    model, x = family(name)
    made = to_integers(model, calibrate(model, x).finish(), bits=bits)
    with torch.no_grad():
        expected = FakeQuantizedGraph(made, floats(model), bits)(torch.tensor(x)).numpy()
    found = run(stripped(made), x)
    held = IntegerModel.read(made)
    step = float(held.tensors()[held.activations[-1].scale])
    assert np.abs(found - expected).max() <= 1.01 * max(step, np.abs(expected).max() / 100)
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.95


@pytest.mark.parametrize("bits", [8, 4])
def test_what_training_learned_is_what_the_runtime_serves(bits: int) -> None:
    data = digits()
    model = graph_of(trained(), data.x)
    made = to_integers(model, calibrate(model, data.x).finish(), bits=bits)
    before = accuracy(stripped(made))
    train(made, floats(model), data.x, data.y, bits=bits, settings=QatSettings(20, 32, 2e-3))
    assert accuracy(stripped(made)) >= before - 0.01
    held = IntegerModel.read(made)
    tensors = held.tensors()
    learned = {}
    for q in (*held.weights, *held.biases):
        column = [-1 if i == q.axis else 1 for i in range(tensors[q.codes].ndim)]
        learned[q.name] = tensors[q.codes] * tensors[q.scale].reshape(column)
    for q in held.weights:
        assert np.abs(tensors[q.codes]).max() <= levels(bits)
    for q in held.biases:
        assert q.inputs is not None
        assert (tensors[q.scale] == tensors[q.inputs[0]] * tensors[q.inputs[1]]).all()
    with torch.no_grad():
        expected = FakeQuantizedGraph(made, learned, bits)(torch.tensor(data.held_x)).numpy()
    found = run(stripped(made), data.held_x)
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.99


def test_training_closes_most_of_the_gap_at_three_bits() -> None:
    data = digits()
    model = graph_of(trained(), data.x)
    made = to_integers(model, calibrate(model, data.x).finish(), bits=3)
    before, whole = accuracy(stripped(made)), accuracy(stripped(to_integers(model, calibrate(model, data.x).finish())))
    assert before < whole - 0.03
    train(made, floats(model), data.x, data.y, bits=3, settings=QatSettings(80, 32, 4e-3))
    assert accuracy(stripped(made)) - before >= 0.5 * (whole - before)


def test_an_operator_that_the_interpreter_lacks_is_named() -> None:
    data = digits()
    model = graph_of(trained(), data.x)
    made = to_integers(model, calibrate(model, data.x).finish())
    made.graph.node[-1].op_type, made.graph.node[-1].name = "Sinh", "odd"
    with pytest.raises(ExportError, match=r"Sinh \(node 'odd'\)"):
        FakeQuantizedGraph(made, floats(model), 8)
