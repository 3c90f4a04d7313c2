"""The whole way: from a specification to an integer file or a bundle, through the gates, with a report that is true."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from edge_sdk.bundle import Bundle
from edge_sdk.errors import TaskError
from edge_sdk.ranges import BINS, Bounds, RangeStats, rescaled
from edge_sdk.runtime import Predictor, Stepper, late_constants
from export.build import Deploy, ProgramSpec, build_bundle
from export.errors import SpecError
from export.quantize.kernels import kernels_of, quiet
from export.quantize.pipeline import Recipe, quantize_model, score
from export.quantize.report import GateFailed
from export.quantize.settings import QatSettings
from export.spec import load_spec
from export.torch_import import forward_graph
from tests.export.quantize.nets import accuracy, digits, trained


@pytest.fixture(scope="module")
def forward():
    return forward_graph(trained(), digits().x[:2])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory):
    data, path = digits(), tmp_path_factory.mktemp("deploy") / "net.bundle"
    build_bundle(
        trained(), (data.x, data.y), path, name="net", loss="cross_entropy",
        programs=[ProgramSpec("head", {}, "float", "sgd")],
        deploy=Deploy(Recipe(flash_kb=100, allow=("latency",)), data.held_x, data.held_y),
    )  # fmt: skip
    with Bundle.open(path) as opened:
        yield opened


def test_where_accuracy_falls_too_far_it_trains_and_says_so(forward) -> None:
    found = quantize_model(
        forward,
        digits(),
        Recipe(memory=False, bits=3, tolerance=0.02, qat=QatSettings(120, 64, 2e-3), allow=("latency",)),
    )
    assert any(step.startswith("qat3") for step in found.report.method)
    assert found.report.integer_score >= found.report.float_score - 0.02
    assert accuracy(found.integer) == found.report.integer_score


def test_the_accuracy_gate_stops_and_its_allowance_is_recorded(forward) -> None:
    with pytest.raises(GateFailed, match=r"net: nothing was written:\n  accuracy: the score falls from 0\.9.* to 0\."):
        quantize_model(forward, digits(), Recipe(memory=False, bits=2, qat=None), name="net")
    found = quantize_model(forward, digits(), Recipe(memory=False, bits=2, qat=None, allow=("accuracy", "latency")))
    assert set(found.report.allowed) >= {"accuracy"}


def test_a_flash_that_is_too_small_is_refused(forward) -> None:
    with pytest.raises(GateFailed, match="budget: .* bytes, the profile has 1 KB of flash"):
        quantize_model(forward, digits(), Recipe(memory=False, flash_kb=1))


def test_slower_integers_ship_only_where_the_flash_holds_no_float(forward) -> None:
    """The net is so small that this machine's float kernels win; where they do not, integers ship in any case."""
    roomy = quantize_model(forward, digits(), Recipe(memory=False, flash_kb=1000))
    float_kb = roomy.report.float_bytes // 1024
    tight = quantize_model(forward, digits(), Recipe(memory=False, flash_kb=float_kb - 1))
    slower = roomy.report.integer_cpu_us > roomy.report.float_cpu_us
    assert roomy.report.ships == ("float" if slower else "integer")
    assert tight.report.ships == "integer"
    assert (roomy.model == roomy.integer) == (not slower)
    if slower:
        assert "slower" in roomy.report.reason


def test_the_bundle_serves_integers_and_scores_them_on_the_device(bundle: Bundle) -> None:
    data = digits()
    program = bundle.program("net/evaluate/int8")
    model = onnx.load(bundle.file(str(program.infer)))
    assert kernels_of(model.SerializeToString()).all_integer
    report = bundle.report["quantization"]
    assert report["ships"] == "integer"
    served = Predictor(bundle, program, bundle.initial(program)).predict(data.held_x)
    assert score(np.asarray(served), data.held_y) == report["integer_score"]
    stepper = Stepper(bundle, program, bundle.initial(program))
    stepper.step({"d.x": data.held_x, "d.y": data.held_y})
    counted = stepper.tensors()
    assert counted["evaluate.total"].sum() == len(data.held_y)
    assert counted["evaluate.correct"].sum() / len(data.held_y) == pytest.approx(report["integer_score"])


def test_what_devices_observe_is_what_the_exporter_would_see(bundle: Bundle, forward) -> None:
    x, y = digits().x[:96], digits().y[:96]
    program, names = bundle.program("net/observe/float"), bundle.report["observed"]
    stats = RangeStats()
    total = np.zeros(BINS)
    for device, rows in enumerate(np.split(np.arange(96), 3)):
        stepper = Stepper(bundle, program, bundle.initial(program))
        for part in np.split(rows, 2):
            stepper.step({"d.x": x[part], "d.y": y[part]})
        seen = stepper.tensors()
        total += seen["observe.histogram"][names.index("d.x")]
        stats = stats.combine(RangeStats.observed(f"device{device}", names, seen["observe.low"], seen["observe.high"]))
        stepper.close()
    whole = Stepper(bundle, program, bundle.initial(program))
    whole.step({"d.x": x, "d.y": y})
    pooled = whole.tensors()
    found = stats.finish()
    for index, name in enumerate(names):
        assert found[name] == (pooled["observe.low"][index], pooled["observe.high"][index])
    assert found["d.x"] == (0.0, float(x.max()))
    assert total.sum() == x.size
    assert isinstance(stats.clients["device0"]["d.x"], Bounds)


def test_new_scales_reach_a_device_without_a_new_bundle(tmp_path: Path) -> None:
    """Exported with dim samples; what devices observe repairs it, and the kernels stay those of integers."""
    data, path = digits(), tmp_path / "dim.bundle"
    dim = (0.15 * data.x[:200], data.y[:200])
    build_bundle(
        trained(), dim, path, name="net", loss="cross_entropy", programs=[ProgramSpec("head", {}, "float", "sgd")],
        deploy=Deploy(Recipe(memory=False, qat=None, allow=("latency", "accuracy")), data.held_x, data.held_y),
    )  # fmt: skip
    with Bundle.open(path) as opened:
        program, observe = opened.program("net/evaluate/int8"), opened.program("net/observe/float")
        start = opened.initial(program)
        predictor = Predictor(opened, program, start)
        before = score(np.asarray(predictor.predict(data.held_x)), data.held_y)
        stepper = Stepper(opened, observe, opened.initial(observe))
        stepper.step({"d.x": data.x[:200], "d.y": data.y[:200]})
        seen = stepper.tensors()
        names = opened.report["observed"]
        stats = RangeStats.observed("device", names, seen["observe.low"], seen["observe.high"])
        new = rescaled(start, stats.finish())
        predictor.set_tensors(new)
        after = score(np.asarray(predictor.predict(data.held_x)), data.held_y)
        assert after >= opened.report["quantization"]["float_score"] - 0.01
        assert after >= before + 0.03
        assert kernels_of(opened.file(str(program.infer)), late_constants(opened, program, new)).all_integer
        counting = Stepper(opened, program, new)
        counting.step({"d.x": data.held_x, "d.y": data.held_y})
        assert counting.tensors()["evaluate.correct"].sum() == round(after * len(data.held_y))
        predictor.set_tensors(start)
        assert score(np.asarray(predictor.predict(data.held_x)), data.held_y) == before
        wrong = {**start, "scale.d.x": np.zeros(3, np.float32)}
        with pytest.raises(
            TaskError, match=r"'scale.d.x' of 'net/evaluate/int8' should be float32 \[\], found float32 \[3\]"
        ):
            predictor.set_tensors(wrong)
        assert score(np.asarray(predictor.predict(data.held_x)), data.held_y) == before

        answers = [np.asarray(Predictor(opened, program, held).predict(data.held_x[:40])) for held in (start, new)]
        told: list[np.ndarray] = []
        stop = threading.Event()
        asking = threading.Thread(
            target=lambda: [
                told.append(np.asarray(predictor.predict(data.held_x[:40]))) for _ in iter(stop.is_set, True)
            ]
        )
        asking.start()
        for _ in range(15):
            predictor.set_tensors(new)
            predictor.set_tensors(start)
        stop.set()
        asking.join()
        assert told
        assert all(any(np.array_equal(found, answer) for answer in answers) for found in told)


SPEC = """
name = "net"
model = "net.onnx"
example = "example.npz"
loss = "cross_entropy"
[[program]]
scope = "head"
[deploy]
{deploy}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = digits()
    torch.onnx.export(
        trained(), (torch.tensor(data.x[:2]),), tmp_path / "net.onnx", dynamo=True, opset_version=21, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("n")},), external_data=False,
    )  # fmt: skip
    np.savez(tmp_path / "example.npz", x=data.x[:500], y=data.y[:500])
    return tmp_path


def cli(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_sdk.cli", "export", "quantize", "spec.toml", "-o", "net.int.onnx", *arguments],
        capture_output=True, text=True, timeout=120, cwd=folder, env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip


def test_the_command_writes_an_integer_file_or_nothing(folder: Path) -> None:
    (folder / "spec.toml").write_text(SPEC.format(deploy='flash_kb = 8\nqat_steps = 0\nallow = ["latency"]'))
    done = cli(folder, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    content = (folder / "net.int.onnx").read_bytes()
    assert len(content) == report["integer_bytes"]
    session = onnxruntime.InferenceSession(content, quiet())
    assert session.run(None, {session.get_inputs()[0].name: digits().held_x})[0].shape == (597, 10)
    (folder / "net.int.onnx").unlink()
    refused = cli(folder, "--bits", "2")
    assert refused.returncode == 6
    assert "accuracy: the score falls" in refused.stderr
    assert not (folder / "net.int.onnx").exists()


@pytest.mark.parametrize(
    ("deploy", "told"),
    [
        ("bit = 8", "unknown key 'bit' of .deploy."),
        ('bits = "8"', "bits = '8' of .deploy. has the wrong type"),
        ('allow = ["speed"]', "the gates are fusion, accuracy, latency, budget"),
        ('profile = "x86_gateway"\nflash_kb = 3', "profile and flash_kb"),
    ],
)
def test_a_deploy_table_that_is_wrong_is_refused(tmp_path: Path, deploy: str, told: str) -> None:
    (tmp_path / "spec.toml").write_text(SPEC.format(deploy=deploy))
    with pytest.raises(SpecError, match=told):
        load_spec(tmp_path / "spec.toml")
