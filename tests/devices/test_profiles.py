"""Device profiles: what is refused, and what a device that measures itself writes (23)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from devices.bench import fresh_process, interleaved_us
from devices.profile import ProfileError, load_profile, profile_names
from tests.tiny_bundle import tiny_bundle

GOOD = """
name = "board"
arch = "aarch64"
cores = { value = 4, from = "datasheet" }
ram_mb = { value = 512, from = "measured" }
flash_kb = { value = 8000, from = "assumed" }
runtime_overhead_mb = { value = 54, from = "measured" }
"""


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_that_comes_with_edgewise_is_sound(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.flash_kb > 0
    assert all("measured" in warning for warning in profile.warnings())


def test_only_measured_numbers_come_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text(GOOD)
    assert load_profile(path).warnings() == [
        "cores is datasheet, not measured", "flash_kb is assumed, not measured",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("ram = 3", r"ram is '3', expected one of"),
        ("watts = 3.5", r"watts is '3.5', expected \{ value = NUMBER"),
        ('watts = { value = 3.5, from = "hearsay" }', r"watts.from is 'hearsay', expected one of measured"),
        ('watts = { value = -1, from = "measured" }', r"watts is '-1', expected a number of 0 or more"),
        ("bits = []", r"bits is '\[\]'"),
        ("bits = [1]", r"bits is '\[1\]'"),
        ('activation = "f16"', r"activation is 'f16'"),
        ("[runtime]\nspeed = 3", r"runtime.speed"),
        ('[[program]]\nid = "p"', r"program is .* expected the keys id, step_ms"),
    ],
)
def test_what_cannot_be_is_refused_naming_file_and_key(tmp_path: Path, change: str, told: str) -> None:
    path = tmp_path / "board.toml"
    path.write_text(f"{GOOD}\n{change}\n")
    with pytest.raises(ProfileError, match=rf"board\.toml: {told}"):
        load_profile(path)


def test_less_memory_than_the_runtime_itself_takes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text(GOOD.replace("value = 512", "value = 32"))
    with pytest.raises(ProfileError, match="ram_mb is '32.0', expected at least runtime_overhead_mb = 54"):
        load_profile(path)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ProfileError, match="known: .*x86_gateway"):
        load_profile("toaster")


def test_a_device_measures_itself_and_writes_a_profile_that_loads(tmp_path: Path) -> None:
    bundle = tmp_path / "tiny.bundle"
    tiny_bundle(bundle)
    written = tmp_path / "me.toml"
    done = subprocess.run(
        [sys.executable, "-m", "edge_sdk.cli", "devices", "probe", str(bundle), "--write", str(written), "--json"],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    profile = load_profile(written)
    assert profile.warnings() == []
    assert {entry.program: entry.step_ms.value for entry in profile.programs} == {
        entry["program"]: entry["step_ms"] for entry in found["programs"]
    }
    assert all(entry["step_ms"] > 0 for entry in found["programs"])
    assert 30 < found["runtime_overhead_mb"] < 200


def test_the_peak_of_a_fresh_process_does_not_inherit_ours() -> None:
    ours = np.ones(40_000_000)  # 320 MB
    assert fresh_process(None)["vmhwm_kb"] < 200_000 < ours.nbytes // 1024


def test_the_least_of_interleaved_times_orders_what_costs_differently() -> None:
    small, large = np.ones((20, 20)), np.ones((300, 300))
    found = interleaved_us({"small": lambda: small @ small, "large": lambda: large @ large}, 30)
    assert found["small"] < found["large"]
