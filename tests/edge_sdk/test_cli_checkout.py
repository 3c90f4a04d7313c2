"""`edgewise bench NAME` runs a file of the checkout, and says so where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edge_sdk.cli import main
from tests.environments import CHECKOUT, python_of


def test_bench_runs_the_benchmark_of_that_name_and_ends_with_its_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edge_sdk.cli", "bench", "footprint"]
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=CHECKOUT, timeout=60)
    assert helped.returncode == 0, helped.stderr
    assert "--repeat-task N" in helped.stdout
    refused = subprocess.run(
        [*command, "--json", tmp_path / "no" / "out.json"], capture_output=True, text=True, cwd=CHECKOUT, timeout=60
    )
    assert refused.returncode == 4
    assert refused.stderr.endswith("its folder does not exist\n")


def test_a_benchmark_that_does_not_exist_is_a_wrong_argument(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "no-such-thing"]) == 2
    assert "there is no benchmark 'no-such-thing'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["bench", "footprint"], ["demo"]])
def test_without_a_checkout_they_say_where_the_code_is(command: list[str]) -> None:
    edgewise = python_of(".venv-device").with_name("edgewise")
    done = subprocess.run([edgewise, *command], capture_output=True, text=True, cwd="/", timeout=60)
    assert done.returncode == 4
    assert "is part of the source checkout and not of the installed package: clone the repository" in done.stderr
    assert done.stderr.count("\n") == 1
