"""What benchmarks share: JSON of one shape, a table that can be read, and errors of one line."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from benchmarks.report import CheckFailed, Report, main, parser, ratio, table

FOUND = Report([{"name": "ours", "ms": 1.25}, {"name": "theirs", "ms": None}], {"ratio": 0.5})


def run(*argv: str, measure=lambda args: FOUND) -> int:
    return main(measure, lambda report: f"ratio {report.summary['ratio']}", parser("trial", "A trial."), argv)


def test_rows_and_summary_are_written_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--json", str(tmp_path / "out.json")) == 0
    assert json.loads((tmp_path / "out.json").read_text()) == {"rows": list(FOUND.rows), "summary": FOUND.summary}
    assert capsys.readouterr().out == "ratio 0.5\n"


def test_a_folder_that_is_missing_is_noticed_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[argparse.Namespace] = []
    assert run("--json", str(tmp_path / "no" / "out.json"), measure=measured.append) == 4
    assert measured == []
    assert capsys.readouterr().err.endswith("its folder does not exist\n")


def test_an_error_is_one_line_and_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def refused(_: argparse.Namespace) -> Report:
        raise CheckFailed("not the\nsame work")

    def absent(_: argparse.Namespace) -> Report:
        import no_such_package  # noqa: F401

    assert run(measure=refused) == 5
    assert run(measure=absent) == 4
    assert capsys.readouterr().err.splitlines() == [
        "edgewise bench trial: not the same work",
        "edgewise bench trial: this benchmark needs the package 'no_such_package': pip install 'edgewise[bench]'",
    ]


def test_a_table_aligns_its_columns_and_marks_what_was_not_measured() -> None:
    rows = [{"name": "ours", "ms": 1.25, "mb": 93.14}, {"name": "a longer name", "ms": None, "mb": 7}]
    assert table(rows, {"name": "", "mb": "MB", "ms": "step ms"}).splitlines() == [
        "                 MB  step ms",
        "ours           93.1    1.250",
        "a longer name     7        -",
    ]


def test_a_ratio_of_what_was_not_measured_is_none() -> None:
    assert ratio(1.0, 4.0) == 0.25
    assert ratio(None, 4.0) is None
    assert ratio(1.0, None) is None
    assert ratio(1.0, 0.0) is None
