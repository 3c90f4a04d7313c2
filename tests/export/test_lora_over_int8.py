"""Adapters over an int8 base learn from B = 0 as well as over the float base (SG10)."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from edge_sdk.bundle import Bundle, Program
from edge_sdk.runtime import RuntimeProfile, Stepper
from export import ProgramSpec, build_bundle
from tests.export.models import NETS, example, net

STEPS = 50


@pytest.fixture(scope="module", params=NETS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp(request.param) / "net.bundle"
    programs = [ProgramSpec("lora", {"rank": 2}, precision, "adamw") for precision in ("float", "int8")]
    build_bundle(net(request.param), example(request.param), path, name="net", loss="cross_entropy", programs=programs)
    with Bundle.open(path) as opened:
        yield request.param, opened


def program_of(bundle: Bundle, precision: str) -> Program:
    return next(p for p in bundle.programs.values() if p.precision == precision and not p.accumulates)


def test_the_loss_after_fifty_steps_is_that_over_the_float_base(bundle) -> None:
    name, opened = bundle
    x, y = example(name, 32, seed=9)
    pattern = np.random.default_rng(2).normal(size=(4, x.shape[1], *[1] * (x.ndim - 2))).astype(np.float32)
    x = x + pattern[y]  # something to learn
    losses = {}
    for precision in ("float", "int8"):
        program = program_of(opened, precision)
        start = opened.initial(program)
        assert all((value == 0).all() for key, value in start.items() if key.endswith("lora_b"))
        stepper = Stepper(opened, program, start, RuntimeProfile(cache_bytes=0))
        losses[precision] = [stepper.step({"d.x": x, "d.y": y}, {"lr": 0.01}).loss for _ in range(STEPS)]
        trained = stepper.tensors()
        assert all((value != start[key]).any() for key, value in trained.items()), "a factor did not move"
    assert losses["int8"][-1] < 0.9 * losses["int8"][0]
    assert losses["int8"][-1] <= 1.02 * losses["float"][-1]


def test_no_quantizer_stands_between_a_factor_and_its_product(bundle) -> None:
    _, opened = bundle
    program = program_of(opened, "int8")
    quantized = 0
    for file in program.graphs:
        graph = onnx.load(opened.file(file), load_external_data=False).graph
        codes = {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.INT8}
        for node in graph.node:
            if "quantize" in node.op_type.lower():
                assert node.op_type == "DequantizeLinear"
                assert node.input[0] in codes, f"{node.name} reads what is no constant"
                quantized += 1
    assert quantized > 0


def test_the_frozen_weights_of_the_int8_program_take_a_quarter(bundle) -> None:
    name, opened = bundle
    sizes = {}
    for precision in ("float", "int8"):
        graph = onnx.load(opened.file(str(program_of(opened, precision).infer))).graph
        weights = [t for t in graph.initializer if len(t.dims) > 1 and np.prod(t.dims) > 20]
        sizes[precision] = sum(onnx.numpy_helper.to_array(t).nbytes for t in weights)
    assert sizes["int8"] <= 0.3 * sizes["float"], name
