"""Models and settings beside the usual ones: blocks in a bundle, shared weights, tokens, processors that saturate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from devices.bench import probe
from edge_sdk.bundle import Bundle
from edge_sdk.ranges import RangeError, rescaled
from edge_sdk.runtime import Predictor
from export import ProgramSpec, build_bundle
from export.adapters import merged
from export.build import Deploy
from export.errors import SpecError
from export.quantize.blocks import to_blocks
from export.quantize.pipeline import Recipe, quantize_model
from export.quantize.ptq import IntegerModel
from export.quantize.settings import QatSettings
from export.spec import deploy_of, load_spec
from tests.export.quantize.nets import digits, graph_of, trained
from tests.export.test_tokens import Bag, texts

ANY = ("accuracy", "latency", "fusion")
SIZE, STEPS = 32, 4


class Attentive(nn.Module):
    """A small transformer whose linear layer may be used twice."""

    def __init__(self, uses: int) -> None:
        super().__init__()
        self.uses = uses
        self.norm, self.query, self.shared = nn.LayerNorm(SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.head = nn.Linear(SIZE, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        scores = (self.query(y) @ y.transpose(1, 2)).softmax(-1)
        y = scores @ y
        for _ in range(self.uses):
            y = torch.relu(self.shared(y))
        return self.head(y.mean(1))


def sequences(count: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    return draw.normal(size=(count, STEPS, SIZE)).astype(np.float32), draw.integers(0, 3, count)


def test_a_weight_that_two_products_read_is_quantized_once() -> None:
    torch.manual_seed(0)
    x, _ = sequences(8)
    model = Attentive(2).eval()
    made = to_blocks(graph_of(model, x))
    assert len([node for node in made.graph.node if node.op_type == "DequantizeLinear"]) == 2
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x})
    with torch.no_grad():
        exact = model(torch.tensor(x)).numpy()
    assert 0 < np.abs(found - exact).max() < 0.2 * np.abs(exact).max()


def test_a_transformer_in_blocks_goes_into_a_bundle_whose_adapters_can_be_merged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, path = Attentive(1).eval(), tmp_path / "t4.bundle"
    x, y = sequences(24)
    deploy = Deploy(Recipe(bits=4, memory=False, allow=ANY), x, y)
    spec = ProgramSpec("lora", {"rank": 2, "targets": ["query"]}, "float", "sgd")
    build_bundle(model, (x, y), path, name="t4", loss="cross_entropy", programs=[spec], deploy=deploy)
    with Bundle.open(path) as opened:
        served = next(program for program in opened.programs.values() if program.infer and program.accumulates)
        assert np.asarray(Predictor(opened, served, opened.initial(served)).predict(x)).shape == (24, 3)
        assert opened.report["observed"] == []
        master = {name: value.detach().numpy() for name, value in model.named_parameters()}
        start = opened.initial(opened.program("t4/lora/r2/float"))
        weights = merged(opened, opened.program("t4/lora/r2/float"), start, master)
        assert np.array_equal(weights["query.weight"], master["query.weight"])  # B is zero


def test_a_model_of_tokens_is_deployed_and_measured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y = texts(40)
    deploy = Deploy(Recipe(qat=None, allow=ANY), x, y)
    spec = ProgramSpec("head", {}, "float", "sgd")
    build_bundle(
        Bag(), (x, y), tmp_path / "bag.bundle", name="bag", loss="cross_entropy", programs=[spec], deploy=deploy
    )
    with Bundle.open(tmp_path / "bag.bundle") as opened:
        assert opened.report["quantization"]["float_vmhwm_kb"] > 0
        assert {times.program for times in probe(opened, runs=2).programs} == set(opened.programs)


def test_seven_bits_stay_seven_bits_also_after_training() -> None:
    data = digits()
    recipe = Recipe(
        reduce_range=True, tolerance=-1.0, memory=False, allow=ANY, qat=QatSettings(steps=40, learning_rate=5e-3)
    )
    found = quantize_model(graph_of(trained(), data.x), data, recipe)
    assert found.report.method[-1].startswith("qat7")
    held = IntegerModel.read(found.graph)
    tensors = held.tensors()
    assert held.weights
    for weight in held.weights:
        assert 50 < np.abs(tensors[weight.codes].astype(int)).max() <= 63


def test_the_profile_says_whether_products_saturate_and_which_bits_there_are(tmp_path: Path) -> None:
    head = (
        'name = "n"\nmodel = "m:n"\nexample = "e.npz"\nloss = "cross_entropy"\n[[program]]\nscope = "head"\n[deploy]\n'
    )
    (tmp_path / "spec.toml").write_text(head + 'profile = "x86_no_vnni"\n')
    x, y = sequences(10)
    assert deploy_of(load_spec(tmp_path / "spec.toml"), x, y)[0].recipe.reduce_range
    (tmp_path / "spec.toml").write_text(head + 'profile = "x86_no_vnni"\nbits = 3\n')
    with pytest.raises(SpecError, match="bits = 3, but profile 'x86_no_vnni' runs"):
        deploy_of(load_spec(tmp_path / "spec.toml"), x, y)


def test_a_bias_follows_its_activation_whatever_that_is_called() -> None:
    late = {
        "scale.model.after.conv": np.array(1, np.float32),
        "zero_point.model.after.conv": np.array(0, np.uint8),
        "bias.head.after.model.after.conv": np.array([100], np.int32),
        "bias_scale.head.after.model.after.conv": np.array([0.1], np.float32),
    }
    new = rescaled(late, {"model.after.conv": (0.0, 510.0)})
    assert new["scale.model.after.conv"] == 2
    assert new["bias.head.after.model.after.conv"] == [50]
    assert new["bias_scale.head.after.model.after.conv"] == [np.float32(0.2)]
    del late["scale.model.after.conv"]
    with pytest.raises(RangeError, match="belongs to no scale"):
        rescaled(late, {"model.after.conv": (0.0, 510.0)})
