"""`make fuzz`: one parser of `tests.security.parsers` under atheris, guided by coverage, until time is up or it breaks."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["edge_sdk", "aggregator", "devices"]):
    from tests.security.parsers import PARSERS


def main() -> None:
    """`python -m tests.security.fuzz PARSER [options of libFuzzer]`."""
    parser = PARSERS[sys.argv[1]]
    with tempfile.TemporaryDirectory(prefix="edgewise-corpus-") as corpus:
        for number, example in enumerate(parser.examples()):
            (Path(corpus) / str(number)).write_bytes(example)
        atheris.Setup([sys.argv[0], *sys.argv[2:], corpus], parser.survives)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
