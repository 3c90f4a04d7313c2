"""A study that is cut off goes on where it was, and repeats nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.runs import Runs
from edge_sdk.errors import StorageError


def measured(runs: Runs, seed: int, made: list[int]) -> Mapping[str, Any]:
    def run() -> Mapping[str, Any]:
        made.append(seed)
        return {"final": seed / 10}

    return runs.row({"rule": "mean", "seed": seed}, run)


@pytest.mark.parametrize("torn", ["", '{"key": {"rule": "mean", "se'])
def test_runs_of_an_earlier_study_are_not_repeated(tmp_path: Path, torn: str) -> None:
    path, made = tmp_path / "runs.jsonl", list[int]()
    first = [measured(Runs(path), seed, made) for seed in (1, 2)]
    with path.open("a") as file:
        file.write(torn)  # the process was killed while it wrote
    again = Runs(path)
    assert [measured(again, seed, made) for seed in (1, 2, 3)] == [*first, {"rule": "mean", "seed": 3, "final": 0.3}]
    assert made == [1, 2, 3]
    measured(Runs(path), 3, made)
    assert made == [1, 2, 3]


def test_without_a_file_a_run_is_kept_for_the_study_alone() -> None:
    runs, made = Runs(None), list[int]()
    assert measured(runs, 1, made) == measured(runs, 1, made)
    assert made == [1]
    measured(Runs(None), 1, made)
    assert made == [1, 1]


def test_a_file_of_something_else_is_refused_by_line_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text('{"key": {}, "row": {}}\nnotes\nmore')
    with pytest.raises(StorageError, match=r"notes.txt, line 2: not a run of a study .* name another file"):
        Runs(path)
    assert path.read_text().endswith("more")
