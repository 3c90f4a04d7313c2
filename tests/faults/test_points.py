"""Crash points kill where they are asked to, and only there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

PASS_THREE = "from edge_sdk import faults\nfor i in range(3):\n print(i, flush=True)\n faults.point('D4')\n"


def run(faults: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "EDGEWISE_FAULTS"}
    if faults is not None:
        environment["EDGEWISE_FAULTS"] = faults
    return subprocess.run([sys.executable, "-c", PASS_THREE], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(("faults", "passed"), [("D4", 1), ("D4:1", 1), ("D1, D4:3", 3)])
def test_a_named_point_kills_at_the_passing_it_names(faults: str, passed: int) -> None:
    result = run(faults)
    assert result.returncode == -signal.SIGKILL
    assert len(result.stdout.split()) == passed


@pytest.mark.parametrize("faults", [None, "", "D5", "D4:4"])
def test_other_points_are_inactive(faults: str | None) -> None:
    result = run(faults)
    assert result.returncode == 0
    assert len(result.stdout.split()) == 3
