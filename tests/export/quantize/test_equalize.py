"""A net whose channels differ by orders of magnitude survives the pipeline; an inexact equalization is undone (17)."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from export.graph import array_of, clone, constant
from export.quantize.calibration import calibrate, parsed
from export.quantize.equalize import equalize
from export.quantize.pipeline import Recipe, quantize_model
from export.quantize.ptq import stripped, to_integers
from tests.export.quantize.nets import SmallCnn, accuracy, digits, graph_of, run, trained

SPREAD = 1.5


@pytest.fixture(scope="module")
def model() -> ir.Model:
    return graph_of(trained(), digits().x)


@pytest.fixture(scope="module")
def hostile(model: ir.Model) -> ir.Model:
    """The same function: channel j between two layers is multiplied by 10^U(-s, s) and divided again."""
    made, draw = clone(model), np.random.default_rng(1)
    names = ("conv1.weight", "depthwise.weight", "conv2.weight", "head.weight")
    for first, second in itertools.pairwise(names):
        rows = len(array_of(made.graph.initializers[first]))
        factor = (10 ** draw.uniform(-SPREAD, SPREAD, rows)).astype(np.float32)
        bias = {"conv1.weight": "norm.bias"}.get(first, first.replace("weight", "bias"))
        for name, by, axis in (
            (first, factor, 0), (bias, factor, 0), (second, 1 / factor, 0 if second.startswith("depthwise") else 1),
        ):  # fmt: skip
            held = made.graph.initializers[name]
            array = array_of(held)
            held.const_value = constant(
                name, (array * by.reshape([-1 if i == axis else 1 for i in range(array.ndim)])).astype(np.float32)
            ).const_value
    return made


def quantized(model: ir.Model) -> bytes:
    return stripped(to_integers(model, calibrate(model, digits().x).finish()))


def test_the_hostile_net_is_the_same_function_and_breaks_without_equalization(
    model: ir.Model, hostile: ir.Model
) -> None:
    whole = accuracy(stripped(parsed(model)))
    assert whole > 0.9
    assert accuracy(stripped(parsed(hostile))) == pytest.approx(whole, abs=0.004)
    assert accuracy(quantized(hostile)) < whole - 0.05


def test_the_pipeline_brings_the_hostile_net_within_a_point_of_float(hostile: ir.Model) -> None:
    found = quantize_model(hostile, digits(), Recipe(memory=False, qat=None, allow=("latency",)))
    assert "equalize" in found.report.method
    assert found.report.integer_score >= found.report.float_score - 0.01
    assert accuracy(found.integer) == found.report.integer_score


def test_equalization_leaves_the_function(hostile: ir.Model) -> None:
    made, x = clone(hostile), digits().held_x
    assert equalize(made, digits().x[:32]) == 3
    before, after = (run(stripped(parsed(m)), x) for m in (hostile, made))
    assert np.abs(before - after).max() <= 1e-4 * np.abs(before).max()


def test_an_equalization_across_relu6_that_changes_the_output_is_undone() -> None:
    torch.manual_seed(3)
    net = SmallCnn(nn.ReLU6)
    with torch.no_grad():
        net.depthwise.weight.mul_(80)  # drives what follows to the bound
    model = graph_of(net.eval(), digits().x)
    before = {name: array_of(value) for name, value in model.graph.initializers.items()}
    output = run(stripped(parsed(model)), digits().held_x)
    equalize(model, digits().x[:32])
    assert (array_of(model.graph.initializers["conv2.weight"]) == before["conv2.weight"]).all()
    assert np.abs(run(stripped(parsed(model)), digits().held_x) - output).max() <= 1e-4 * np.abs(output).max()
