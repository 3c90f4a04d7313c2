"""The oldest supported onnxruntime computes what the newest computes, from one bundle."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from export import ProgramSpec, build_bundle
from tests.environments import CHECKOUT, python_of, run
from tests.export.models import example, net
from tests.system import runtime_work
from tests.tiny_bundle import HEAD, LORA, tiny_bundle

TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def oldest() -> Path:
    """The interpreter of the environment with the oldest runtime."""
    return python_of(".venv-oldest")


def written_by_hand(folder: Path) -> tuple[Path, list[str]]:
    return tiny_bundle(folder / "tiny.bundle"), [HEAD, LORA]


def exported(folder: Path) -> tuple[Path, list[str]]:
    # AdamW only where no gradient is near 0, whose sign would decide about a whole step.
    programs = [ProgramSpec("lora", {"rank": 2}, "int8", "sgd"), ProgramSpec("head", {}, "int8", "adamw")]
    report = build_bundle(
        net("conv1d"),
        example("conv1d"),
        folder / "net.bundle",
        name="net",
        loss="cross_entropy",
        programs=programs,
    )
    return report.path, [program.id for program in report.programs]


@pytest.mark.parametrize("make", [written_by_hand, exported])
def test_both_give_the_same_predictions_steps_counts_and_updates(tmp_path: Path, oldest: Path, make) -> None:
    path, programs = make(tmp_path)
    run(oldest, CHECKOUT / "tests" / "system" / "runtime_work.py", path, tmp_path / "old.npz", *programs)
    ours = runtime_work.results(path, programs)
    with np.load(tmp_path / "old.npz") as file:
        theirs = dict(file)
    assert theirs.keys() == ours.keys()
    assert str(theirs.pop("runtime")) != ours.pop("runtime")
    for name, value in ours.items():
        np.testing.assert_allclose(theirs[name], value, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)
    for program in programs:
        moved = ours[f"{program}: prediction, trained"] - ours[f"{program}: prediction, start"]
        assert np.abs(moved).max() > 100 * TOLERANCE, "the steps changed nothing that could be compared"


def test_the_oldest_environment_has_the_version_that_the_package_admits(oldest: Path) -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    (bounds,) = (line for line in project["dependencies"] if line.startswith("onnxruntime"))
    said = run(oldest, "-c", "import onnxruntime; print(onnxruntime.__version__)")
    found, ours = ([int(part) for part in text.strip().split(".")] for text in (said, onnxruntime.__version__))
    assert bounds == f"onnxruntime>={found[0]}.{found[1]},<2"
    assert found < ours
