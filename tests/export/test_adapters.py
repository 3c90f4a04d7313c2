"""Trained adapters leave a bundle merged into the float weights, or in the format of PEFT; torch says what they compute."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import nn

from edge_sdk.bundle import Bundle
from edge_sdk.cli import main
from edge_sdk.runtime import Predictor
from edge_sdk.tensors import Array, pack
from export import ProgramSpec, build_bundle

RANK, ALPHA = 2, 6.0


class Net(nn.Module):
    """A convolution, a packed attention and linear layers that are not square."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.attention = nn.Conv1d(3, 8, 5, padding=2), nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.wide, self.head = nn.LayerNorm(8), nn.Linear(8, 14), nn.Linear(14, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.conv(x)).transpose(1, 2)
        y = self.norm(y + self.attention(y, y, y, need_weights=False)[0]).mean(1)
        return self.head(torch.tanh(self.wide(y)))


OPTIONS = {
    "plain": {"targets": ["conv", "wide"], "also_train": ["head", "norm"], "scaling": "rank_stabilised"},
    "packed": {"targets": ["*.v_proj", "wide"], "side_rank": 3},
}


class Trained:
    """Files of a bundle, its master and a model in which everything has moved."""

    def __init__(self, folder: Path, kind: str) -> None:
        torch.manual_seed(1)
        draw = np.random.default_rng(2)
        self.net = Net().eval()
        self.x = draw.normal(size=(6, 3, 10)).astype(np.float32)
        self.bundle, self.master, self.model = (folder / n for n in ("net.bundle", "master", "model"))
        save_file(self.net.state_dict(), self.master)
        spec = ProgramSpec("lora", {"rank": RANK, "alpha": ALPHA, **OPTIONS[kind]}, "float")
        example = self.x, np.arange(6) % 4
        build_bundle(self.net, example, self.bundle, name="net", loss="cross_entropy", programs=[spec])
        with Bundle.open(self.bundle) as bundle:
            program = next(p for p in bundle.programs.values() if not p.accumulates)
            start = bundle.initial(program)
            self.tensors: dict[str, Array] = {
                name: value + draw.normal(0, 0.3, value.shape).astype(np.float32) for name, value in start.items()
            }
            self.served = np.asarray(Predictor(bundle, program, self.tensors).predict(self.x))
        self.model.write_bytes(pack(self.tensors))

    def run(self, command: str, output: Path, *more: str) -> int:
        files = ["--model", str(self.model), "--master", str(self.master), "-o", str(output)]
        return main(["export", command, str(self.bundle), *files, *more])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    return {kind: Trained(tmp_path_factory.mktemp(kind), kind) for kind in OPTIONS}


@pytest.fixture
def plain(trained: dict[str, Trained]) -> Trained:
    return trained["plain"]


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_merged_weights_compute_in_torch_what_devices_compute(
    trained: dict[str, Trained], kind: str, tmp_path: Path
) -> None:
    either = trained[kind]
    assert either.run("merge", tmp_path / "merged") == 0
    merged = load_file(tmp_path / "merged")
    before = load_file(either.master)
    assert {n: (v.shape, v.dtype) for n, v in merged.items()} == {n: (v.shape, v.dtype) for n, v in before.items()}
    net = Net().eval()
    net.load_state_dict({name: torch.as_tensor(value) for name, value in merged.items()})
    with torch.no_grad():
        found = net(torch.as_tensor(either.x)).numpy()
        unchanged = either.net(torch.as_tensor(either.x)).numpy()
    assert np.abs(found - either.served).max() < 1e-5
    assert np.abs(unchanged - either.served).max() > 0.1


def test_peft_finds_its_names_and_shapes_and_the_same_product(plain: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    assert plain.run("peft", folder, "--base-model", "press/net") == 0
    config = json.loads((folder / "adapter_config.json").read_text())
    held = load_file(folder / "adapter_model.safetensors")
    stem = "base_model.model."
    assert {name: value.shape for name, value in held.items()} == {
        f"{stem}conv.lora_A.weight": (RANK, 3, 5),
        f"{stem}conv.lora_B.weight": (8, RANK, 1),
        f"{stem}wide.lora_A.weight": (RANK, 8),
        f"{stem}wide.lora_B.weight": (14, RANK),
        f"{stem}head.weight": (4, 14),
        f"{stem}head.bias": (4,),
        f"{stem}norm.weight": (8,),
        f"{stem}norm.bias": (8,),
    }
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "press/net"
    assert (config["r"], config["target_modules"]) == (RANK, ["conv", "wide"])
    assert config["modules_to_save"] == ["head", "norm"]
    # What PEFT does with it (lora/layer.py): W0 + lora_alpha / r * B A.
    assert not config["use_rslora"]
    assert not config["fan_in_fan_out"]
    scale = config["lora_alpha"] / config["r"]
    assert scale == pytest.approx(ALPHA / RANK**0.5)
    assert plain.run("merge", tmp_path / "merged") == 0
    merged, master = load_file(tmp_path / "merged"), load_file(plain.master)
    for layer in ("conv", "wide"):
        a, b = (held[f"{stem}{layer}.lora_{part}.weight"].astype(np.float64) for part in "AB")
        product = (b.reshape(len(b), RANK) @ a.reshape(RANK, -1)).reshape(master[f"{layer}.weight"].shape)
        assert np.abs(master[f"{layer}.weight"] + scale * product - merged[f"{layer}.weight"]).max() < 1e-6


def test_what_peft_cannot_hold_is_refused_and_nothing_is_written(
    trained: dict[str, Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained["packed"].run("peft", tmp_path / "adapter") == 3
    assert "merge instead" in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()


def test_a_foreign_master_or_model_is_named(plain: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, output = tmp_path / "other", tmp_path / "merged"
    files = {"--model": str(plain.model), "--master": str(plain.master)}
    narrow = {**plain.net.state_dict(), "wide.weight": torch.zeros(13, 8)}
    cases = [
        ("--master", narrow, "'wide.weight' [13, 8], expected 14 x 8"),
        ("--model", {"p": torch.ones(1)}, "no program"),
    ]
    for option, content, told in cases:
        save_file(content, other)
        given = {**files, option: str(other)}
        assert (
            main(
                ["export", "merge", str(plain.bundle), "-o", str(output), *(x for pair in given.items() for x in pair)]
            )
            == 3
        )
        assert told in capsys.readouterr().err
    other.write_bytes(b"nothing")
    given = {**files, "--master": str(other)}
    assert (
        main(["export", "merge", str(plain.bundle), "-o", str(output), *(x for pair in given.items() for x in pair)])
        == 3
    )
    assert "not a safetensors file" in capsys.readouterr().err
    assert not output.exists()
