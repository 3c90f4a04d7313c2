"""The `edgewise` command: finds its subcommands by entry point, so that the ground floor imports nothing above it.

A subcommand is an entry point of the group `edgewise.commands`: a function `register(parser)` that adds arguments
and sets `run` (a function of the parsed arguments that returns the exit code), or sets `forward` (a function of the
arguments as they came, where another program reads them). Only the subcommand that was asked
for is imported, so `edgewise job` works where the exporter's packages are not installed.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points, version

from edge_sdk.errors import EdgewiseError

GROUP = "edgewise.commands"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code (listed in `edge_sdk.errors`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {point.name: point for point in entry_points(group=GROUP)}
    parser = argparse.ArgumentParser(
        prog="edgewise",
        description="Federated learning for the small computers of a factory.",
        epilog="commands: " + ", ".join(sorted(commands)) + "; `edgewise COMMAND --help` says more",
    )
    parser.add_argument("--version", action="version", version=f"edgewise {version('edgewise')}")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="log more (twice: everything)")
    parser.add_argument("command", choices=sorted(commands), metavar="COMMAND")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...")
    known = parser.parse_args(arguments)
    logging.basicConfig(
        level=[logging.WARNING, logging.INFO, logging.DEBUG][min(known.verbose, 2)],
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        return _run(commands[known.command], known.rest)
    except EdgewiseError as error:
        print("edgewise: " + " ".join(str(error).split()), file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("edgewise: interrupted", file=sys.stderr)
        return 130


def _run(point: EntryPoint, rest: Sequence[str]) -> int:
    try:
        register = point.load()
    except ModuleNotFoundError as error:
        print(
            f"edgewise: '{point.name}' needs the package {error.name!r}, which is not installed: "
            f"pip install 'edgewise[{_EXTRA.get(point.name, 'aggregator')}]'",
            file=sys.stderr,
        )
        return 4
    parser = argparse.ArgumentParser(prog=f"edgewise {point.name}")
    register(parser)
    forward = parser.get_default("forward")
    if forward is not None:
        return int(forward(list(rest)))
    args = parser.parse_args(rest)
    run = getattr(args, "run", None)
    if run is None:
        parser.print_help()
        return 2
    return int(run(args))


_EXTRA = {"export": "export", "demo": "demo", "bench": "bench"}


if __name__ == "__main__":
    sys.exit(main())
