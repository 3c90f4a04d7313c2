"""What benchmarks share: the option `--json`, the shape of its file, and a table of rows."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_sdk.errors import EdgewiseError


@dataclass(frozen=True)
class Report:
    """Rows of plain JSON values, and the figures that sum them up."""

    rows: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with `--json FILE`; the benchmark adds its own options."""
    result = argparse.ArgumentParser(prog=f"edgewise bench {name}", description=description)
    result.add_argument("--json", type=Path, metavar="FILE", help="write rows and summary to this file")
    return result


def main(
    measure: Callable[[argparse.Namespace], Report],
    show: Callable[[Report], str],
    arguments: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> int:
    """Measure, print what `show` makes of it, write the JSON. An error is one line and its exit code."""
    args = arguments.parse_args(argv)
    try:
        report = measure(args)
    except EdgewiseError as error:
        print(f"{arguments.prog}: {error}", file=sys.stderr)
        return error.exit_code
    print(show(report))
    if args.json is not None:
        args.json.write_text(json.dumps(asdict(report), indent=2, allow_nan=False) + "\n")
    return 0


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Rows as text; `columns` maps keys to headings."""
    lines = [list(columns.values())]
    lines += [[_cell(row.get(key)) for key in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
