"""`edgewise demo` and `edgewise bench`: commands whose code lies in a checkout, not in the installed packages."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from edge_sdk.errors import MissingDependency

CHECKOUT = Path(__file__).resolve().parent.parent


def register_demo(parser: argparse.ArgumentParser) -> None:
    """`edgewise demo [...]`: all arguments, `--help` too, go to `examples/demo.py`."""
    parser.set_defaults(forward=lambda arguments: _run_module("examples.demo", arguments))


def register_bench(parser: argparse.ArgumentParser) -> None:
    """`edgewise bench NAME [...]` is `python -m benchmarks.NAME`; a hyphen in the name stands for an underscore."""
    parser.set_defaults(forward=_bench)


def _bench(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print("usage: edgewise bench NAME [the benchmark's own arguments, such as --json FILE]")
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    name, folder = arguments[0].replace("-", "_"), CHECKOUT / "benchmarks"
    if folder.is_dir() and not (folder / f"{name}.py").is_file():
        print(f"edgewise: there is no benchmark {arguments[0]!r}: each is a file in {folder}", file=sys.stderr)
        return 2
    return _run_module(f"benchmarks.{name}", arguments[1:])


def _run_module(module: str, arguments: list[str]) -> int:
    if not CHECKOUT.joinpath(*module.split(".")).with_suffix(".py").is_file():
        raise MissingDependency(
            f"{module} is part of the source checkout and not of the installed package: "
            "clone the repository and run the command there"
        )
    # The child stands in for us, so that an interrupt reaches it directly and its exit code is ours.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    if sys.platform == "win32":
        return subprocess.run([sys.executable, "-m", module, *arguments], env=environment, check=False).returncode
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment)
    return None
