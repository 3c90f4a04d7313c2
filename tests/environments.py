"""The environments beside this one that `make test` makes: what a device has, and the oldest runtime that is supported."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
SOURCES = ("edge_sdk", "aggregator", "export", "devices")


def python_of(environment: str) -> Path:
    """The interpreter of `.venv-device` or `.venv-oldest`, if it was made from the sources as they are.

    Otherwise the test fails in CI, where a skipped test would prove nothing, and is skipped elsewhere.
    """
    ready = CHECKOUT / environment / "ready"
    newest = max(file.stat().st_mtime for file in [CHECKOUT / "pyproject.toml", *_sources()])
    if ready.is_file() and ready.stat().st_mtime >= newest:
        return CHECKOUT / environment / "bin" / "python"
    finding = "is older than the sources" if ready.is_file() else "is missing"
    message = f"{environment} {finding}: make {environment}/ready"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def run(python: Path, *arguments: str | Path) -> str:
    """Run an interpreter isolated from this checkout and return what it prints; fail with what it says on an error."""
    done = subprocess.run([python, "-I", *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def _sources() -> list[Path]:
    return [file for folder in SOURCES for file in (CHECKOUT / folder).rglob("*.py")]
