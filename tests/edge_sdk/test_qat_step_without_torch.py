"""A device trains quantization-aware with the inference runtime alone: fifty steps follow torch, which it cannot import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from edge_sdk.tensors import unpack
from export import ProgramSpec, build_bundle
from tests.environments import CHECKOUT
from tests.export.models import example, net
from tests.export.quantize.straight_through import FakeQuantized

STEPS, RATE, MOMENTUM = 50, 0.05, 0.9
DEVICE = """
import sys
from pathlib import Path
for name in ("torch", "onnx", "onnx_ir", "onnxscript"):
    sys.modules[name] = None  # an import of it fails
import numpy as np
from edge_sdk.bundle import Bundle
from edge_sdk.runtime import Stepper
from edge_sdk.tensors import pack
path, data, out = sys.argv[1:]
held = np.load(data)
with Bundle.open(Path(path)) as bundle:
    program = bundle.program("net/head/qat4")
    stepper = Stepper(bundle, program, bundle.initial(program))
    for _ in range(50):
        stepper.step({"d.x": held["x"], "d.y": held["y"]}, {"lr": 0.05})
    Path(out).write_bytes(pack(stepper.tensors()))
status = Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


def test_fifty_steps_of_a_quantized_head_follow_torch(tmp_path: Path) -> None:
    (x, y), module = example("mlp", 32), net("mlp")
    path, data, out = tmp_path / "net.bundle", tmp_path / "data.npz", tmp_path / "out.safetensors"
    build_bundle(
        module, (x, y), path, name="net", loss="cross_entropy", programs=[ProgramSpec("head", {}, "qat4", "sgd")]
    )
    np.savez(data, x=x, y=y)
    done = subprocess.run(
        [sys.executable, "-c", DEVICE, str(path), str(data), str(out)],
        capture_output=True, text=True, cwd=CHECKOUT, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(f"peak of the device's process: {int(done.stdout) / 1024:.0f} MB")
    assert int(done.stdout) < 160 * 1024
    found = unpack(out.read_bytes())[0]
    expected = by_torch(module, x, y)
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= 1e-5 * max(1.0, np.abs(value).max()), name
        assert np.abs(value - module.state_dict()[name].numpy()).max() > 0.01, "torch itself did not train"


def by_torch(module: torch.nn.Module, x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """The head after as many steps of torch with straight-through rounding; the frozen layer has 4 bits as well."""
    frozen = {name: value.detach().clone() for name, value in module.named_parameters()}
    weight = frozen["first.weight"]
    scale = weight.abs().amax(1, keepdim=True) / 7
    frozen["first.weight"] = torch.round(weight / scale) * scale
    leaves = {name: frozen[name].clone().requires_grad_() for name in ("second.weight", "second.bias")}
    optimizer = torch.optim.SGD(leaves.values(), lr=RATE, momentum=MOMENTUM)
    for _ in range(STEPS):
        with FakeQuantized(4):
            z = torch.func.functional_call(module, {**frozen, **leaves}, (torch.tensor(x),))
        optimizer.zero_grad()
        functional.cross_entropy(z, torch.tensor(y)).backward()
        optimizer.step()
    return {name: value.detach().numpy() for name, value in leaves.items()}
