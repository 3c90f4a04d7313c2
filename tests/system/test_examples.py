"""The examples are run as their readers would run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.system.site import Site
from tests.tiny_bundle import tiny_data

CHECKOUT = Path(__file__).resolve().parents[2]


def test_the_smallest_app_predicts_records_and_learns(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a"], job={"rounds": 1})
    x, y = tiny_data(30, seed=3)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    app = subprocess.Popen(
        [
            sys.executable,
            CHECKOUT / "examples" / "minimal_app.py",
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
