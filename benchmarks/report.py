"""What all benchmarks share: their arguments, the shape of their JSON, the table that they print, and how they end.

The JSON is `{"rows": [...], "summary": {...}}`: one row per thing that was measured, and the figures that are quoted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_sdk.errors import EdgewiseError, MissingDependency, StorageError


class CheckFailed(EdgewiseError):
    """What was to be compared is not comparable, or a goal that was asked for with an option is missed."""

    exit_code = 5


@dataclass(frozen=True)
class Report:
    """What a benchmark found: rows of plain JSON values, and the figures that sum them up."""

    rows: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]

    def write(self, path: Path) -> None:
        """Write the JSON. Raises `StorageError`."""
        text = json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"
        try:
            path.write_text(text)
        except OSError as error:
            raise StorageError(f"{path}: cannot be written ({error.strerror})") from error


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes; it adds its own."""
    result = argparse.ArgumentParser(
        prog=f"edgewise bench {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--json", type=Path, metavar="FILE", help="write rows and summary to this file")
    return result


def main(
    measure: Callable[[argparse.Namespace], Report],
    show: Callable[[Report], str],
    arguments: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> int:
    """Run a benchmark, print what `show` makes of its report, write the JSON; an error is one line and an exit code."""
    args = arguments.parse_args(argv)
    try:
        if args.json is not None and not args.json.resolve().parent.is_dir():
            raise StorageError(f"{args.json}: its folder does not exist")  # before the minutes, not after
        report = measure(args)
        print(show(report))
        if args.json is not None:
            report.write(args.json)
    except ModuleNotFoundError as error:
        absent = MissingDependency(f"this benchmark needs the package {error.name!r}: pip install 'edgewise[bench]'")
        return _failed(arguments.prog, absent)
    except EdgewiseError as error:
        return _failed(arguments.prog, error)
    except KeyboardInterrupt:
        print(f"{arguments.prog}: interrupted", file=sys.stderr)
        return 130
    return 0


def positive(text: str) -> int:
    """The type of an argument that counts: a whole number of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Rows as text. `columns` maps a row's key to the heading above it; a missing value is shown as `-`."""
    cells = [list(columns.values()), *([_cell(row.get(key)) for key in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def ratio(value: float | None, of: float | None) -> float | None:
    """`value / of`, None where one of them was not measured."""
    return value / of if value is not None and of else None


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
    return str(value)


def _failed(prog: str, error: EdgewiseError) -> int:
    print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
    return error.exit_code
