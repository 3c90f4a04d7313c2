"""The demo as a user starts it: a process, its output, its JSON, and what is left when it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.environments import python_of

CHECKOUT = Path(__file__).resolve().parents[2]
SHORT = ["--rounds", "2", "--steps", "10", "--no-controls"]


def demo(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    python_of(".venv-device")
    return subprocess.Popen(
        [sys.executable, "-m", "edge_sdk.cli", "demo", "--folder", str(folder), *arguments],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in the background of a shell has SIGINT ignored, and so have all children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )


def processes_of(folder: Path) -> set[int]:
    """The processes whose command line or folder names this run."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                told = (entry / "cmdline").read_bytes().decode(errors="replace")
                where = str((entry / "cwd").readlink())
            except OSError:
                continue
            if str(folder) in told or where.startswith(str(folder)):
                found.add(int(entry.name))
    return found


@pytest.mark.parametrize("broker", ["mosquitto", "iotcore"])
def test_the_demo_runs_on_each_broker_and_tells_what_it_found(tmp_path: Path, broker: str) -> None:
    report = tmp_path / "out.json"
    run = demo(tmp_path / "run", *SHORT, "--broker", broker, "--json", str(report))
    told, complaints = run.communicate(timeout=300)
    assert run.returncode == 0, complaints
    found = json.loads(report.read_text())
    assert found["broker"] == broker
    assert ("nothing survives a restart" in told) is (broker == "iotcore")
    assert (found["lost"], found["duplicated"], found["rounds"]) == (0, 0, 2)
    assert found["torch_importable_on_device"] is False
    assert found["accuracy_after"] > found["accuracy_before"]
    assert len(found["devices"]) == 6
    for device in found["devices"]:
        assert device["updates_sent"] == device["updates_merged"] == 5  # 2 trained, 3 measured
        assert device["bytes_up"] > 0
        assert device["bytes_down"] > 0
        assert 40 < device["peak_rss_mb"] < 150
    assert Path(found["model"]).is_file()
    assert processes_of(tmp_path / "run") == set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_demo_leaves_nothing_running(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    run = demo(folder, "--no-controls", "--rounds", "500")
    until = time.monotonic() + 120
    while len(processes_of(folder)) < 9:  # the demo, its gateway, the broker and six devices
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < until, "the federation did not start"
        time.sleep(0.1)
    run.send_signal(number)
    told = run.communicate(timeout=120)[1]
    if number is not signal.SIGKILL:
        assert run.returncode == 130
        assert "interrupted" in told
    until = time.monotonic() + 15
    while processes_of(folder) and time.monotonic() < until:
        time.sleep(0.1)
    assert processes_of(folder) == set()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--base", "2,3", "--test", "3,6"], "share person 3"),
        (["--base", "2,11"], "people are numbered 1 to 10, found [11]"),
        (["--rounds", "0"], "must be at least 1, found 0"),
        (["--device-python", "/nowhere/python"], "run `make demo` once"),
    ],
)
def test_what_the_demo_cannot_do_is_one_line(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    run = demo(tmp_path / "run", *arguments)
    told, complaints = run.communicate(timeout=60)
    assert run.returncode == 2
    assert told == ""
    assert complaint in complaints
    assert len(complaints.strip().splitlines()) == 1
