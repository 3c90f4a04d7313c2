"""The arrows of the house: who may import whom, and what a device must never carry."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
NOT_ON_A_DEVICE = ("torch", "onnx", "onnx_ir", "onnxscript", "pydantic", "fastapi", "starlette", "flask")
GROUND_FLOOR = sorted(
    f"edge_sdk.{path.stem}" for path in (CHECKOUT / "edge_sdk").glob("*.py") if path.stem != "__init__"
)


def run_clean(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT, timeout=120)


def test_imports_point_one_way() -> None:
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], capture_output=True, text=True, cwd=CHECKOUT
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_ground_floor_loads_nothing_heavy() -> None:
    code = (
        f"import importlib, sys\nfor name in {GROUND_FLOOR!r}: importlib.import_module(name)\n"
        f"print([name for name in {NOT_ON_A_DEVICE!r} if name in sys.modules])"
    )
    result = run_clean(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_the_base_install_asks_for_five_packages_and_no_more() -> None:
    requires = importlib.metadata.requires("edgewise") or []
    base = {re.split(r"[<>=!~ ;\[]", line)[0] for line in requires if "extra ==" not in line}
    assert base == {"numpy", "onnxruntime", "paho-mqtt", "safetensors", "cryptography"}


@pytest.mark.parametrize("package", ["aggregator", "devices"])
def test_the_gateway_and_the_flasher_load_no_torch(package: str) -> None:
    modules = sorted(
        ".".join(path.relative_to(CHECKOUT).with_suffix("").parts).removesuffix(".__init__")
        for path in (CHECKOUT / package).rglob("*.py")
        if path.stem not in ("__main__", "broker_iotcore")
    )
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        "print([name for name in ('torch', 'onnx', 'onnx_ir') if name in sys.modules])"
    )
    result = run_clean(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("machine", ["edge_sdk/conversation.py", "aggregator/intake.py", "aggregator/rounds.py"])
def test_what_decides_has_no_clock_no_chance_no_network_and_no_disk(machine: str) -> None:
    tree = ast.parse((CHECKOUT / machine).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    shells = {"time", "datetime", "random", "secrets", "socket", "sqlite3", "threading", "os", "pathlib", "paho"}
    assert {name.split(".")[0] for name in imported}.isdisjoint(shells)
    assert imported.isdisjoint({"edge_sdk.link", "edge_sdk.outbox", "aggregator.journal", "aggregator.broker"})
