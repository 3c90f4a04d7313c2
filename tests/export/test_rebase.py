"""A rebase puts adapters and side terms into the base: the new bundle serves what the old one served with its trained model."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from edge_sdk.bundle import Bundle
from edge_sdk.cli import main
from edge_sdk.keys import SigningKey
from edge_sdk.runtime import Predictor, Stepper
from edge_sdk.tensors import Array, pack

SPEC = """
name = "net"
model = "rebased_net:net"
weights = "net.safetensors"
example = "example.npz"
loss = "cross_entropy"
[[program]]
scope = "lora"
precision = "int8"
optimizer = "sgd"
rank = 2
side_rank = 3
"""
MODULE = """
from torch import nn

def net():
    return nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4))
"""
LORA = "net/lora/r2/int8"


class Trained:
    """A specification, the bundle that was built from it, and a model whose adapters and side terms have moved."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.spec = folder, folder / "spec.toml"
        self.bundle, self.model, self.weights = folder / "net.bundle", folder / "model", folder / "net.safetensors"
        self.new, self.new_weights = folder / "new.bundle", folder / "new.safetensors"
        self.key = folder / "release.key"
        draw = np.random.default_rng(5)
        self.x = draw.normal(size=(32, 12)).astype(np.float32)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4))
        save_file({name: value.numpy() for name, value in net.state_dict().items()}, self.weights)
        np.savez(folder / "example.npz", x=self.x, y=np.arange(32) % 4)
        (folder / "rebased_net.py").write_text(textwrap.dedent(MODULE))
        self.spec.write_text(SPEC)
        SigningKey.generate(self.key)
        assert main(["export", "build", str(self.spec), "-o", str(self.bundle)]) == 0
        with Bundle.open(self.bundle) as bundle:
            start = bundle.initial(bundle.program(LORA))
        moved = {name: value + draw.normal(0, 0.4, value.shape).astype(np.float32) for name, value in start.items()}
        self.model.write_bytes(pack(moved))
        self.served = outputs(self.bundle, self.x, moved)

    def rebase(self, *more: str) -> int:
        given = [str(self.spec), str(self.bundle), "--model", str(self.model), "-o", str(self.new)]
        return main(["export", "rebase", *given, "-w", str(self.new_weights), *more])


def outputs(path: Path, x: Array, tensors: dict[str, Array] | None = None) -> Array:
    with Bundle.open(path) as bundle:
        program = bundle.program(LORA)
        return np.asarray(Predictor(bundle, program, tensors or bundle.initial(program)).predict(x))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("rebase"))


@pytest.fixture(autouse=True)
def as_built(trained: Trained) -> Iterator[None]:
    """Every test finds the specification and the weights that the bundle was built from, and no output."""
    weights = trained.weights.read_bytes()
    yield
    trained.spec.write_text(SPEC)
    trained.weights.write_bytes(weights)
    trained.new.unlink(missing_ok=True)
    trained.new_weights.unlink(missing_ok=True)


def test_the_new_bundle_starts_where_the_old_model_was_and_trains_on(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained.rebase("--key", str(trained.key)) == 0
    assert "signed; its outputs are" in capsys.readouterr().out
    size = np.sqrt(np.mean(trained.served**2))
    assert np.abs(outputs(trained.bundle, trained.x) - trained.served).max() > size  # training moved much
    assert np.sqrt(np.mean((outputs(trained.new, trained.x) - trained.served) ** 2)) < 0.03 * size
    with Bundle.open(trained.new, release_key=SigningKey.load(trained.key).verify_key) as bundle:
        program = bundle.program(LORA)
        start = bundle.initial(program)
        idle = [name for name, entry in bundle.tensors.items() if entry.merge in ("lora_b", "side_l", "side_q")]
        assert idle
        assert all(not start[name].any() for name in idle)
        stepper = Stepper(bundle, program, start)
        y = np.arange(32) % 4
        losses = [stepper.step({"d.x": trained.x, "d.y": y}, {"lr": 0.1}).loss for _ in range(20)]
        stepper.close()
    assert losses[-1] < losses[0]


def test_the_new_weights_are_the_base_of_the_next_rebase(trained: Trained) -> None:
    assert trained.rebase() == 0
    trained.spec.write_text(SPEC.replace("net.safetensors", "new.safetensors"))
    again = trained.folder / "again.bundle"
    assert main(["export", "build", str(trained.spec), "-o", str(again)]) == 0
    assert again.read_bytes() == trained.new.read_bytes()


def test_weights_that_the_bundle_was_not_built_from_are_refused(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {name: 2 * value for name, value in load_file(trained.weights).items()}
    save_file(other, trained.weights)
    assert trained.rebase() == 3
    assert "serve other outputs" in capsys.readouterr().err
    assert not trained.new.exists()
    assert not trained.new_weights.exists()


def test_another_specification_is_refused(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    trained.spec.write_text(SPEC.replace("rank = 2\n", "rank = 1\n", 1))
    assert trained.rebase() == 3
    assert f"builds no program '{LORA}'" in capsys.readouterr().err
    assert not trained.new.exists()
