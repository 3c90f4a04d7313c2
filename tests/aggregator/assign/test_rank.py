"""A device gets the largest rank that its profile has memory for, and time for before the deadline."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aggregator.assign import AssignError
from aggregator.assign.fixed import FixedAssigner
from aggregator.assign.rank import RANK
from aggregator.job import Job, load_job
from devices.profile import ProfileError
from edge_sdk.bundle import Bundle
from tests.tiny_bundle import HEAD, LORA, tiny_bundle

MB = 1_000_000
RANKS = {"tiny/lora/r8/float": (8, 400 * MB, 3e6), "tiny/lora/r4/float": (4, 200 * MB, 2e6), LORA: (2, 100 * MB, 1e6)}
LARGE, MIDDLE, SMALL = RANKS
JOB = f"""
site = "bremen"
job = "watch"
bundle = "tiny.bundle"
program = "{LARGE}"
rounds = 20
[keys]
control = "control.key"
[devices]
registry = "devices.json"
[round]
deadline_seconds = 100.0
evaluate_share = 0.5
[task]
steps = 1000
learning_rate = 0.01
[assign]
rule = "rank"
rank = {{ profiles = {{ board = "board.toml" }} }}
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """The tiny bundle, whose rank 2 says what it takes, opened; two larger ranks stand beside it."""
    with Bundle.open(tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny.bundle")) as opened:
        small = opened.program(LORA)
        opened.programs = dict(opened.programs) | {
            name: replace(small, id=name, rank=rank, cost={"state_bytes": state, "step_flops": flops})
            for name, (rank, state, flops) in RANKS.items()
        }
        yield opened


def assigner(
    folder: Path, bundle: Bundle, ram_mb: float, times: Sequence[tuple[str, float]] = (), **job: Any
) -> FixedAssigner:
    """The assigner of a job with one board of so much memory, 74 MB of them the runtime's."""
    numbers = {"cores": 1, "ram_mb": ram_mb, "flash_kb": 1000, "runtime_overhead_mb": 74}
    lines = ['name = "board"', 'arch = "aarch64"']
    lines += [f'{key} = {{ value = {value}, from = "assumed" }}' for key, value in numbers.items()]
    for program, ms in times:
        lines += ["[[program]]", f"id = {json.dumps(program)}", f'step_ms = {{ value = {ms}, from = "measured" }}']
        lines += ['measured_on = "the board"', 'date = "2026-11-25"']
    (folder / "board.toml").write_text("\n".join(lines) + "\n")
    text = JOB
    for old, new in job.items():
        text = text.replace(old, new)
    return RANK.create(loaded(folder, text), bundle)


def loaded(folder: Path, text: str = JOB) -> Job:
    (folder / "job.toml").write_text(text)
    return load_job(folder / "job.toml")


@pytest.mark.parametrize(("ram_mb", "chosen"), [(2000, LARGE), (300, MIDDLE), (200, SMALL)])
def test_memory_bounds_the_rank(tmp_path: Path, bundle: Bundle, ram_mb: int, chosen: str) -> None:
    found = assigner(tmp_path, bundle, ram_mb)
    assert found.usual(1, "board") == chosen
    assert found.programs[0] == LARGE


def test_a_device_without_a_profile_trains_the_program_of_the_job(tmp_path: Path, bundle: Bundle) -> None:
    assert assigner(tmp_path, bundle, 200).usual(1, "another") == LARGE


@pytest.mark.parametrize(("step_ms", "chosen"), [(49, LARGE), (51, MIDDLE)])
def test_a_measured_step_time_bounds_the_rank(tmp_path: Path, bundle: Bundle, step_ms: float, chosen: str) -> None:
    """1000 steps in the 50 seconds that the evaluation leaves of 100."""
    found = assigner(tmp_path, bundle, 2000, [(LARGE, step_ms), (MIDDLE, 40)])
    assert found.usual(1, "board") == chosen
    assert found.notes == ()


@pytest.mark.parametrize(("step_ms", "chosen"), [(16, LARGE), (20, MIDDLE), (30, SMALL)])
def test_another_rank_takes_time_in_proportion_to_its_operations(
    tmp_path: Path, bundle: Bundle, step_ms: float, chosen: str
) -> None:
    """Rank 4 has twice and rank 8 three times the operations of rank 2, the one that was measured."""
    assert assigner(tmp_path, bundle, 2000, [(SMALL, step_ms)]).usual(1, "board") == chosen


def test_a_profile_without_times_is_judged_by_memory_and_the_job_says_so(tmp_path: Path, bundle: Bundle) -> None:
    found = assigner(tmp_path, bundle, 2000, [("other/full/float", 1e6)])
    assert found.usual(1, "board") == LARGE
    (note,) = found.notes
    assert note.startswith("board: nobody measured how long board trains")


@pytest.mark.parametrize(
    ("ram_mb", "times", "message"),
    [
        (150, (), f"{LORA} takes 100.* MB and 76.0 MB are there"),
        (2000, ((SMALL, 60),), f"{LORA} takes 60 s of training"),
    ],
)
def test_a_device_that_can_do_no_rank_is_refused_by_name(
    tmp_path: Path, bundle: Bundle, ram_mb: float, times: Sequence[tuple[str, float]], message: str
) -> None:
    with pytest.raises(AssignError, match=f"assign.rank.profiles.board: board can do no rank: {message}"):
        assigner(tmp_path, bundle, ram_mb, times)


def test_a_bundle_with_one_rank_leaves_nothing_to_choose(tmp_path: Path, bundle: Bundle) -> None:
    job = loaded(tmp_path, JOB.replace(LARGE, HEAD).replace("board.toml", "raspberry_pi_4"))
    with pytest.raises(AssignError, match="only rank of its kind"):
        RANK.create(job, bundle)


def test_an_unknown_profile_is_refused(tmp_path: Path, bundle: Bundle) -> None:
    with pytest.raises(ProfileError, match="there is none; known: .*raspberry_pi_4"):
        RANK.create(loaded(tmp_path, JOB.replace("board.toml", "raspberry_pi_9")), bundle)


def test_the_entry_point_names_this_rule() -> None:
    import tomllib

    content = tomllib.loads((Path(__file__).resolve().parents[3] / "pyproject.toml").read_text())
    assert content["project"]["entry-points"]["edgewise.assigners"]["rank"] == "aggregator.assign.rank:RANK"
