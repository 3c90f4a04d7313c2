"""The arrows of the house: who may import whom, and what a device must never carry."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_sdk.bundle import SCOPES
from tests.environments import CHECKOUT, python_of, run

BASE = {"numpy", "onnxruntime", "paho-mqtt", "safetensors", "cryptography"}
PACKAGES = ("edge_sdk", "devices", "aggregator", "export")
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


def test_a_device_can_import_the_ground_floor_and_nothing_heavy() -> None:
    code = (
        f"import importlib, importlib.util as u\nfor name in {GROUND_FLOOR!r}: importlib.import_module(name)\n"
        f"print([name for name in {NOT_ON_A_DEVICE!r} if u.find_spec(name) is not None])"
    )
    assert run(python_of(".venv-device"), "-c", code).strip() == "[]"


def test_the_wheel_asks_for_five_packages_and_no_more() -> None:
    code = "import importlib.metadata as m, json; print(json.dumps(m.requires('edgewise')))"
    requires = json.loads(run(python_of(".venv-device"), "-c", code))
    base = [re.split(r"[<>=!~ ;\[]", line)[0] for line in requires if "extra ==" not in line]
    assert sorted(base) == sorted(BASE)


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


def test_what_decides_reads_no_clock_draws_no_luck_and_touches_nothing() -> None:
    outside = {
        *("time", "datetime", "random", "secrets", "os", "pathlib", "logging", "threading", "queue", "asyncio"),
        *("socket", "ssl", "sqlite3", "subprocess", "paho", "numpy", "onnxruntime"),
    }
    for module in ("aggregator/rounds.py", "aggregator/intake.py", "edge_sdk/conversation.py"):
        found = set(imported(CHECKOUT / module))
        assert "dataclasses" in found, f"{module}: the imports were not found"
        assert found & outside == set(), module


def test_nothing_is_unpickled() -> None:
    for package in PACKAGES:
        for path in sorted((CHECKOUT / package).rglob("*.py")):
            pickles = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
            assert set(imported(path)) & pickles == set(), path
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    for keyword in node.keywords:
                        pickled = keyword.arg == "allow_pickle" and getattr(keyword.value, "value", True)
                        assert not pickled, f"{path}:{node.lineno} allows pickle"
                    # torch.load unpickles, and not all of its ways are safe.
                    assert ast.unparse(node.func) != "torch.load", f"{path}:{node.lineno}"


def test_device_and_rounds_know_no_method_and_no_scope_by_name() -> None:
    """SG15: a new method must need no change here, so none of these files may name one."""
    entry_points = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["entry-points"]
    methods = {
        name
        for group in ("mergers", "assigners", "scopes", "generators")
        for name in entry_points.get(f"edgewise.{group}", {})
    }
    assert methods >= {"product_svd", "lora"}
    allowed = {
        ("edge_sdk/bundle.py", "layer"),  # a key of the tensor table
        ("edge_sdk/bundle.py", "evaluate"),  # keys of a program
        ("edge_sdk/bundle.py", "precision"),
        ("edge_sdk/bundle.py", "rank"),
        ("edge_sdk/cli_bundle.py", "precision"),
        ("edge_sdk/cli_bundle.py", "rank"),
        ("aggregator/rounds.py", "evaluate"),  # the name of a phase
    }
    files = sorted((CHECKOUT / "edge_sdk").rglob("*.py"))
    files += [CHECKOUT / "aggregator" / name for name in ("rounds.py", "intake.py", "service.py")]
    named = {
        (path.relative_to(CHECKOUT).as_posix(), literal)
        for path in files
        for literal in literals(ast.parse(path.read_text()))
        if literal in methods.union(SCOPES)
    }
    assert named == allowed


def imported(path: Path) -> Iterator[str]:
    """The top-level packages that a file imports, also inside functions, but for what only the type checker reads."""
    tree = ast.parse(path.read_text())
    for node in _without(tree, lambda node: isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def literals(tree: ast.AST) -> Iterator[str]:
    """Every string literal but those of the lists of legal names."""
    legal = ("SCOPES", "ACCUMULATING", "MERGES")

    def is_legal_list(node: ast.AST) -> bool:
        return isinstance(node, ast.AnnAssign) and ast.unparse(node.target) in legal

    for node in _without(tree, is_legal_list):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _without(tree: ast.AST, skip: Callable[[ast.AST], bool]) -> Iterator[ast.AST]:
    """All nodes but those that `skip` accepts and what lies in them."""
    for node in ast.iter_child_nodes(tree):
        if not skip(node):
            yield node
            yield from _without(node, skip)
