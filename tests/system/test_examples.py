"""The examples are run as their readers would run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_sdk import EdgeDevice
from tests.system.site import Site
from tests.tiny_bundle import tiny_data

CHECKOUT = Path(__file__).resolve().parents[2]
APP = CHECKOUT / "examples" / "minimal_app.py"


def test_the_smallest_app_predicts_records_and_learns(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a"], job={"rounds": 1})
    x, y = tiny_data(30, seed=3)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    app = subprocess.Popen(
        [
            sys.executable,
            APP,
            site.config("a"),
            tmp_path / "x.npy",
            tmp_path / "y.npy",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with site.service() as running:
        status = running.wait()
    told, _ = app.communicate(timeout=20)
    assert app.returncode == 0
    assert told.count("predicted") == 30
    assert "kind='update_accepted'" in told
    assert status.history[-1].outcome == "accepted"


def run_app(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, APP, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20
    )


def test_the_smallest_app_records_once_however_often_it_is_started(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a"], samples=5)
    x, y = tiny_data(30, seed=3)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    for _ in range(2):
        assert run_app(site.config("a"), tmp_path / "x.npy", tmp_path / "y.npy").returncode == 0
    with EdgeDevice.open(site.config("a")) as device:
        assert device.status().samples == 5 + 30


@pytest.mark.parametrize(
    ("arguments", "line"),
    [((), "usage: "), (("gone.toml", "x.npy", "y.npy"), "error: "), (("wrong.toml", "x.npy", "x.npy"), "error: ")],
)
def test_the_smallest_app_ends_with_one_line_when_it_cannot_begin(
    tmp_path: Path, arguments: tuple[str, ...], line: str
) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 4), np.float32))
    (tmp_path / "wrong.toml").write_text("id = 3\n")
    done = run_app(*(tmp_path / name for name in arguments))
    assert done.returncode == 1
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1
