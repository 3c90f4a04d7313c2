"""Convolution nets in int8 give the same bits on x86-64 and on aarch64, which runs here by user-mode emulation (22).

`make test-arm` installs the emulator and what it runs; without them the tests are skipped. Emulated times say nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from export.quantize.calibration import calibrate
from export.quantize.ptq import stripped, to_integers
from tests.export.quantize.nets import family, run

ROOT = Path(os.environ.get("EDGEWISE_ARM64", ".arm64")).resolve()
EMULATOR = shutil.which("qemu-aarch64")
pytestmark = pytest.mark.skipif(
    EMULATOR is None or not (ROOT / "ready").exists(), reason="no aarch64 emulation here: run `make test-arm`"
)
PROGRAM = """
import platform, sys
import numpy, onnxruntime
assert platform.machine() == "aarch64", platform.machine()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 4
for name in sys.argv[1:]:
    session = onnxruntime.InferenceSession(f"{name}.onnx", options, providers=["CPUExecutionProvider"])
    numpy.save(f"{name}.out.npy", session.run(None, {"d.x": numpy.load(f"{name}.x.npy")})[0])
"""


def on_arm64(folder: Path, models: dict[str, tuple[bytes, np.ndarray]]) -> dict[str, np.ndarray]:
    """The outputs of models for their inputs, by one emulated process."""
    for name, (model, x) in models.items():
        (folder / f"{name}.onnx").write_bytes(model)
        np.save(folder / f"{name}.x.npy", x)
    root = ROOT / "root"
    done = subprocess.run(
        [str(EMULATOR), "-L", root, "-E", f"PYTHONHOME={root}/usr", "-E", f"PYTHONPATH={root}/site",
         root / "usr/bin/python3", "-c", PROGRAM, *models],
        capture_output=True, text=True, timeout=300, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {name: np.load(folder / f"{name}.out.npy") for name in models}


@pytest.fixture(scope="module")
def nets() -> dict[str, tuple[ir.Model, np.ndarray]]:
    return {name: family(name) for name in ("cnn_all", "depthwise_all", "tiny_resnet8", "tiny_ds_cnn")}


def test_outputs_of_integer_convolution_nets_are_equal_bit_for_bit(tmp_path: Path, nets) -> None:
    models = {}
    for name, (model, x) in nets.items():
        ranges = calibrate(model, x).finish()
        for bits in (8, 4):
            models[f"{name}_{bits}"] = (stripped(to_integers(model, ranges, bits=bits)), x)
    found = on_arm64(tmp_path, models)
    off = {name: float(np.abs(found[name] - run(model, x)).max()) for name, (model, x) in models.items()}
    assert off == dict.fromkeys(models, 0.0)


def test_outputs_of_float_nets_agree_to_rounding(tmp_path: Path, nets) -> None:
    models = {name: (ir.to_proto(model).SerializeToString(), x) for name, (model, x) in nets.items()}
    for name, values in on_arm64(tmp_path, models).items():
        expected = run(*models[name])
        assert np.abs(values - expected).max() <= 1e-5 * np.abs(expected).max(), name
