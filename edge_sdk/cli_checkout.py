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
    """`edgewise demo [...]`: all arguments go to `examples/demo.py`."""
    _pass_on(parser, "the arguments of the demo; see `edgewise demo -- --help`")
    parser.set_defaults(run=lambda args: _run_module("examples.demo", args.rest))


def register_bench(parser: argparse.ArgumentParser) -> None:
    """`edgewise bench NAME [...]` is `python -m benchmarks.NAME`; a hyphen in the name stands for an underscore."""
    parser.add_argument("name", help="which benchmark, for instance watch or footprint")
    _pass_on(parser, "the arguments of the benchmark, for instance --json FILE")
    parser.set_defaults(run=lambda args: _run_benchmark(parser, args.name, args.rest))


def _pass_on(parser: argparse.ArgumentParser, meaning: str) -> None:
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help=meaning)


def _run_benchmark(parser: argparse.ArgumentParser, name: str, arguments: list[str]) -> int:
    module = name.replace("-", "_")
    folder = CHECKOUT / "benchmarks"
    if folder.is_dir() and not (folder / f"{module}.py").is_file():
        parser.error(f"there is no benchmark {name!r}: each is a file in {folder}")
    return _run_module(f"benchmarks.{module}", arguments)


def _run_module(module: str, arguments: list[str]) -> int:
    if not CHECKOUT.joinpath(*module.split(".")).with_suffix(".py").is_file():
        raise MissingDependency(
            f"{module} is part of the source checkout and not of the installed package: "
            "clone the repository and run the command there"
        )
    passed = [argument for argument in arguments if argument != "--"]
    # The child stands in for us, so that an interrupt reaches it directly and its exit code is ours.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    if sys.platform == "win32":
        return subprocess.run([sys.executable, "-m", module, *passed], env=environment, check=False).returncode
    os.execve(sys.executable, [sys.executable, "-m", module, *passed], environment)
    return None
