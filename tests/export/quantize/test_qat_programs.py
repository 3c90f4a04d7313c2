"""Programs of the precisions `qat<b>` and `ptq<b>`: against torch, against the float program, and against themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch.nn import functional

from edge_sdk.bundle import Bundle
from edge_sdk.runtime import Predictor, Stepper
from export import ProgramSpec, build_bundle
from export.errors import SpecError
from export.losses import loss_named
from export.precision import Precision
from export.proof import relative_error
from export.quantize.fold import fold_normalizations
from export.scopes import scope_named
from export.step_graph import gradients_graph, quantized
from export.torch_import import forward_graph, tensors_of
from tests.export.models import NETS, example, net
from tests.export.quantize.straight_through import FakeQuantized, signed


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("name", NETS)
def test_loss_and_gradients_are_those_of_torch_with_straight_through_rounding(name: str, bits: int) -> None:
    module, (x, y) = net(name), example(name)
    forward = forward_graph(module, x[:2])
    folded = fold_normalizations(forward)
    names = [n for n, _ in module.named_parameters() if n in forward.graph.initializers]
    applied = scope_named("full", {}).apply(forward, names, 0)
    model = quantized(forward, applied.trainables, Precision.named(f"qat{bits}"))
    graph = gradients_graph(model, applied.trainables, loss_named("cross_entropy"), name)
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString())
    outputs = [value.name for value in session.get_outputs()]
    for size in (1, 5, 16):
        w = np.random.default_rng(size).uniform(0.5, 1.5, size).astype(np.float32)
        feeds = {f"p.{t.name}": t.value for t in applied.trainables} | {"d.x": x[:size], "d.y": y[:size], "d.w": w}
        found = dict(zip(outputs, session.run(outputs, feeds), strict=True))
        frozen = {n: torch.tensor(folded[n]) if n in folded else v for n, v in tensors_of(module).items()}
        leaves = {t.name: torch.tensor(t.value, requires_grad=True) for t in applied.trainables}
        with FakeQuantized(bits) as counted:
            z = torch.func.functional_call(module, {**frozen, **leaves}, (torch.tensor(x[:size]),))
        assert counted.layers == sum(t.value.ndim > 1 for t in applied.trainables)
        each = functional.cross_entropy(z, torch.tensor(y[:size]), reduction="none")
        loss = (each * torch.tensor(w)).sum() / w.sum()
        assert float(found["loss"]) == pytest.approx(loss.item(), rel=1e-5)
        expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        largest = max(float(value.abs().max()) for value in expected.values())
        for n, value in expected.items():
            assert relative_error(found[f"grad.{n}"], value.numpy(), largest) <= 1e-5, (size, n)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("qat") / "net.bundle"
    programs = [ProgramSpec("full", {}, precision, "sgd") for precision in ("float", "ptq3", "qat3")]
    build_bundle(net("conv2d"), example("conv2d"), path, name="net", loss="cross_entropy", programs=programs)
    with Bundle.open(path) as opened:
        yield opened


def after(bundle: Bundle, program_id: str, steps: int) -> tuple[list[float], dict[str, np.ndarray]]:
    program = bundle.program(program_id)
    stepper = Stepper(bundle, program, bundle.initial(program))
    x, y = example("conv2d")
    losses = [stepper.step({"d.x": x, "d.y": y}, {"lr": 0.05}).loss for _ in range(steps)]
    return losses, stepper.tensors()


def test_the_three_share_one_tensor_table(bundle: Bundle) -> None:
    programs = [bundle.program(f"net/full/{precision}") for precision in ("float", "ptq3", "qat3")]
    assert programs[0].tensors == programs[1].tensors == programs[2].tensors
    assert [len(program.constants) for program in programs] == [0, 0, 0]


def test_a_ptq_program_trains_as_the_float_program_bit_for_bit(bundle: Bundle) -> None:
    (_, plain), (_, ptq) = (after(bundle, f"net/full/{precision}", 5) for precision in ("float", "ptq3"))
    assert all((plain[name] == ptq[name]).all() for name in plain)


def test_a_qat_program_starts_where_the_quantized_network_is_and_learns(bundle: Bundle) -> None:
    losses, trained = after(bundle, "net/full/qat3", 40)
    (float_loss, *_), _ = after(bundle, "net/full/float", 1)
    assert abs(losses[0] - float_loss) > 1e-4
    assert losses[-1] < losses[0] - 0.02
    start = bundle.initial(bundle.program("net/full/qat3"))
    assert all((trained[name] != start[name]).any() for name in start)


def test_what_is_served_is_quantized_for_both_and_for_each_sample_alone(bundle: Bundle) -> None:
    start = bundle.initial(bundle.program("net/full/ptq3"))
    x, _ = example("conv2d")
    ptq, qat, plain = (
        Predictor(bundle, bundle.program(f"net/full/{precision}"), start) for precision in ("ptq3", "qat3", "float")
    )
    assert (ptq.predict(x) == qat.predict(x)).all()
    rounded = {
        name: signed(torch.tensor(value), 3).numpy() if value.ndim > 1 else value for name, value in start.items()
    }
    plain.set_tensors(rounded)
    assert np.abs(ptq.predict(x) - plain.predict(x)).max() < 0.02 * np.abs(plain.predict(x)).max()
    scaled = np.concatenate([x[:1], 100 * x[1:]])
    assert np.allclose(ptq.predict(scaled)[0], ptq.predict(x[:1])[0], atol=1e-6)


@pytest.mark.parametrize("name", ["ptq1", "qat9", "qat", "int4", "QAT4", "qat44"])
def test_an_unknown_precision_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match="qat2 to qat8"):
        Precision.named(name)


def test_adapters_are_not_quantized(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="adapters stay float32"):
        build_bundle(
            net("mlp"), example("mlp"), tmp_path / "n.bundle", name="n", loss="cross_entropy",
            programs=[ProgramSpec("lora", {"rank": 2}, "qat4")],
        )  # fmt: skip
