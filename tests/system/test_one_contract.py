"""One contract for all scopes: a device without torch and onnx runs each of them with the same code (step-graphs.md, SG15, SG16)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from export import ProgramSpec, build_bundle
from tests.environments import CHECKOUT, python_of, run
from tests.export.models import example, net
from tests.system import runtime_work

SPECS = {
    "lora, both factors": ProgramSpec("lora", {"rank": 2}, "int8", "sgd"),
    "lora, A": ProgramSpec("lora", {"rank": 2, "factors": "a"}, "int8", "sgd"),
    "lora, B": ProgramSpec("lora", {"rank": 2, "factors": "b"}, "float", "adamw"),
    "head": ProgramSpec("head", {}, "int8", "adamw+prox"),
    "layer": ProgramSpec("layer", {"modules": ["conv2", "head"]}, "float", "sgd+prox"),
    "full": ProgramSpec("full", {}, "float", "sgd"),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """One file with a program of each scope and its evaluation."""
    path = tmp_path_factory.mktemp("contract") / "net.bundle"
    model, samples = net("conv1d"), example("conv1d")
    report = build_bundle(model, samples, path, name="net", loss="cross_entropy", programs=list(SPECS.values()))
    return path, [program.id for program in report.programs]


@pytest.fixture(scope="module")
def found(bundle: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What a device makes of it."""
    path, programs = bundle
    device, out = python_of(".venv-device"), tmp_path_factory.mktemp("found") / "device.npz"
    absent = "import importlib.util as u; print([n for n in ('torch', 'onnx', 'onnx_ir') if u.find_spec(n)])"
    assert run(device, "-c", absent).strip() == "[]"
    run(device, CHECKOUT / "tests" / "system" / "runtime_work.py", path, out, *programs)
    with np.load(out) as file:
        return dict(file)


@pytest.mark.parametrize("place", range(len(SPECS)), ids=list(SPECS))
def test_a_device_steps_evaluates_and_ends_a_task(
    bundle: tuple[Path, list[str]], found: dict[str, np.ndarray], place: int
) -> None:
    program = bundle[1][place]
    mine = {
        name.removeprefix(f"{program}: "): value for name, value in found.items() if name.startswith(f"{program}: ")
    }
    losses = [float(mine[f"loss of step {number + 1}"]) for number in range(runtime_work.STEPS)]
    assert np.isfinite(losses).all()
    moved = np.abs(mine["prediction, trained"] - mine["prediction, start"]).max() > 1e-6
    # Beside a B of zeros nothing reaches A.
    assert moved == (place != list(SPECS).index("lora, A"))
    assert any(name.startswith("update of ") for name in mine)
    assert mine["examples of the task"] > 0


def test_it_computes_what_the_workstation_computes(
    bundle: tuple[Path, list[str]], found: dict[str, np.ndarray]
) -> None:
    path, programs = bundle
    ours = runtime_work.results(path, programs)
    assert found.keys() == ours.keys()
    for name in ours.keys() - {"runtime"}:
        np.testing.assert_allclose(found[name], ours[name], rtol=1e-5, atol=1e-5, err_msg=name)
