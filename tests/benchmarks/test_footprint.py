"""The parts of the footprint benchmark that need no second environment; `make bench NAME=footprint` runs the whole."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.footprint import (
    COLUMNS,
    _ask,
    _run,
    check_same_work,
    default_torch,
    installed,
    make_flower_environment,
    show,
    summary,
)
from benchmarks.report import CheckFailed, Report
from edge_sdk.errors import MissingDependency


def row(name: str, factor: float = 1.0) -> dict:
    return {"name": name, **{key: 10.0 * factor for key in COLUMNS if key != "name"}, "versions": {}}


def rows() -> list[dict]:
    packages = {**row("packages", 0.5), "task_memory_mb": None, "install_mb": None}
    return [row("ours"), row("theirs", 4.0), packages, {**packages, "name": "bare"}]


def test_the_summary_sets_ours_against_theirs() -> None:
    found = summary(rows())
    assert {found[key] for key in found if key.endswith("_ratio")} == {0.25}
    assert {"install_ratio", "import_time_ratio", "import_memory_ratio", "task_memory_ratio"} <= set(found)
    assert found["task_over_five_packages_mb"] == 5.0
    assert (found["edgewise_task_memory_mb"], found["flower_task_memory_mb"]) == (10.0, 40.0)
    assert "install 0.25, import time 0.25, import memory 0.25, task memory 0.25" in show(Report(rows(), found))


def test_other_losses_are_not_the_same_work() -> None:
    check_same_work([2.0, 1.9], [2.0001, 1.9])
    with pytest.raises(CheckFailed, match="at step 2 Edgewise has loss 1.90000 and Flower 1.80000"):
        check_same_work([2.0, 1.9], [2.0, 1.8])
    with pytest.raises(CheckFailed, match="at step 1 .* nan"):
        check_same_work([float("nan")], [2.0])
    with pytest.raises(CheckFailed, match="trained 1 steps and Flower 2"):
        check_same_work([2.0], [2.0, 1.9])


def test_what_an_environment_brings_along_is_not_counted(tmp_path: Path) -> None:
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    for name, version, size in (("pip", "1.0", 500), ("flwr", "2.0", 70), ("other", "3.0", 30)):
        (site / f"{name}-{version}.dist-info").mkdir(parents=True)
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (site / f"{name}-{version}.dist-info" / "METADATA").write_text(metadata)
        (site / f"{name}.py").write_bytes(bytes(size))
        record = f"{name}.py,,\n{name}-{version}.dist-info/METADATA,,\n{name}-{version}.dist-info/RECORD,,\n"
        (site / f"{name}-{version}.dist-info" / "RECORD").write_text(record)
    kept = sum(
        file.stat().st_size for file in site.rglob("*") if file.is_file() and "pip" not in str(file.relative_to(site))
    )
    assert kept > 100
    assert installed(tmp_path) == (kept, 2, {"flwr": "2.0"})


def test_the_torch_of_the_peer_is_the_makefiles_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TORCH", raising=False)
    assert default_torch().startswith("torch==2.")
    monkeypatch.setenv("TORCH", "torch==9.9")
    assert default_torch() == "torch==9.9"


def test_a_command_that_fails_is_told_by_its_first_error(tmp_path: Path) -> None:
    noise = (
        "import sys; sys.exit('WARNING: slow\\nERROR: No matching distribution found for torch==0\\nnotice: upgrade')"
    )
    with pytest.raises(MissingDependency, match=r"^it failed: ERROR: No matching distribution found for torch==0$"):
        _run([sys.executable, "-c", noise], "it failed")
    with pytest.raises(MissingDependency, match="it failed: .*none: No such file"):
        _run([str(tmp_path / "none")], "it failed")
    with pytest.raises(CheckFailed, match="failed: KeyError: 'no'"):
        _ask(Path(sys.executable), ["-c", "{}['no']"])


def test_an_environment_that_was_made_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "ready").write_text("torch==1")
    make_flower_environment(tmp_path, "torch==1")
    assert [file.name for file in tmp_path.iterdir()] == ["ready"]
