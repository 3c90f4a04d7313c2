"""The allocation as a job uses it: what the job file may say, and what becomes of updates in the journal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aggregator.assign import Assigner, Question, Worked, assigner_for
from aggregator.job import JobError, check_against, load_job
from edge_sdk.bundle import MANIFEST, Bundle
from tests.tiny_bundle import HEAD, LORA, tiny_bundle

PTQ, QAT = "tiny/head/ptq4", "tiny/head/qat4"
JOB = f"""
site = "bremen"
job = "watch"
bundle = "tiny.bundle"
program = "{QAT}"
rounds = 20
[keys]
control = "control.key"
[devices]
registry = "devices.json"
[task]
steps = 10
learning_rate = 0.01
[assign]
rule = "precision"
[assign.precision]
programs = {{ ptq = "{PTQ}", qat = "{QAT}" }}
drop = 0.05
final_qat = 0.0
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """The tiny bundle with two more programs, which say that they differ in precision."""
    folder = tmp_path_factory.mktemp("bundle")
    with Bundle.open(tiny_bundle(folder / "plain.bundle")) as plain:
        programs = json.loads((plain.directory / MANIFEST).read_text())["programs"]
    head = next(row for row in programs if row["id"] == HEAD)
    for program_id, flops in ((PTQ, 100.0), (QAT, 130.0)):
        cost = {"step_flops": flops}
        programs.append({**head, "id": program_id, "precision": program_id.rsplit("/", 1)[1], "cost": cost})
    with Bundle.open(tiny_bundle(folder / "tiny.bundle", programs=programs)) as opened:
        yield opened


def made(folder: Path, bundle: Bundle, *changes: tuple[str, str]) -> Assigner:
    text = JOB
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "job.toml").write_text(text)
    job = load_job(folder / "job.toml")
    check_against(job, bundle)
    return assigner_for(job, bundle)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("drop = 0.05", "", "assign.precision.drop: nobody has measured what tiny/head/ptq4 costs"),
        ("drop = 0.05", "drop = 1.5", "assign.precision.drop = 1.5 must be from 0 to 1"),
        ("drop = 0.05", "drop = 0.05\ntime_factor = 0.9", "assign.precision.time_factor = 0.9 must be 1 or more"),
        ("drop = 0.05", "drop = 0.05\ntime_factor = nan", "assign.precision.time_factor = nan must be a number"),
        ("drop = 0.05", "drop = 0.05\nmin_gain = inf", "assign.precision.min_gain = inf must be a number"),
        ("drop = 0.05", "drop = 0.05\ntime_factor = 1.1\nround_seconds = 3", "time_factor and .*round_seconds exclude each other"),
        ("drop = 0.05", "drop = 0.05\nfine = { evry = 5 }", "did you mean 'assign.precision.fine.every'"),
        (f'ptq = "{PTQ}", ', "", "names the programs ptq and qat, found qat"),
        (f'program = "{QAT}"', f'program = "{HEAD}"', "must be one of assign.precision.programs"),
        (f'ptq = "{PTQ}"', f'ptq = "{QAT}"', "at different precisions"),
        (f'ptq = "{PTQ}"', f'ptq = "{LORA}"', "must train the same tensors"),
        (f'ptq = "{PTQ}"', f'ptq = "{HEAD}"', "has precision 'float', expected ptq<bits>"),
        ('rule = "precision"', 'rule = "precison"', "no assigner is called 'precison'; there are fixed, precision"),
        ('rule = "precision"', "", "assign.precision.programs: assign.rule = 'fixed' does not use it"),
        ('rule = "precision"', f'rule = "precision"\ncycle = ["{PTQ}"]', "assign.cycle: assign.rule = 'precision' does not"),
    ],
)  # fmt: skip
def test_a_job_that_cannot_be_meant_so_is_refused(
    tmp_path: Path, bundle: Bundle, old: str, new: str, message: str
) -> None:
    with pytest.raises(JobError, match=message):
        made(tmp_path, bundle, (old, new))


def test_no_limit_of_time_may_be_asked_for(tmp_path: Path, bundle: Bundle) -> None:
    made(tmp_path, bundle, ("drop = 0.05", "drop = 0.05\ntime_factor = inf"))


def worked(device: str, program: str, ms: float, **more: Any) -> Worked:
    return Worked(device, program, more.get("seconds", 10 * ms / 1000 + 0.1), 100, {"step_ms": ms, "loss_last": 0.1})


class Rounds:
    """Rounds of two devices, with the state as the journal keeps it."""

    def __init__(self, assigner: Assigner) -> None:
        self.assigner, self.number = assigner, 0
        self.state: Mapping[str, Any] | None = None
        self.reasons: Mapping[str, str] = {}

    def next(self, *updates: Worked, loss: float | None = None) -> dict[str, str]:
        self.number += 1
        question = Question(self.number, 20, ["a", "b"], frozenset("ab"), updates, loss)
        answer = self.assigner.answer(self.state, question)
        assert self.assigner.answer(self.state, question) == answer
        self.state, self.reasons = json.loads(json.dumps(answer.state)), answer.reasons
        return dict(answer.programs)


def test_updates_of_the_journal_become_an_allocation(tmp_path: Path, bundle: Bundle) -> None:
    rounds = Rounds(made(tmp_path, bundle))
    assert rounds.next() == {"a": PTQ, "b": PTQ}
    assert rounds.next(worked("a", PTQ, 10.0), worked("b", PTQ, 100.0)) == {"a": QAT, "b": QAT}
    assert rounds.next(worked("a", QAT, 25.0), worked("b", QAT, 250.0)) == {"a": QAT, "b": PTQ}
    assert rounds.reasons["a"] == "free: 0.35 s, a round takes 1.1 s in any case"
    assert rounds.reasons["b"] == "too-slow: a round would take it 2.6 s, at most 1.32 s"


@pytest.mark.parametrize("metrics", [{}, {"step_ms": float("nan")}, {"step_ms": -3.0}])
def test_a_device_that_does_not_say_how_long_its_steps_take_does_ptq(
    tmp_path: Path, bundle: Bundle, metrics: dict[str, float]
) -> None:
    rounds = Rounds(made(tmp_path, bundle))
    rounds.next()
    silent = replace(worked("b", PTQ, 1.0), metrics=metrics)
    assert rounds.next(worked("a", PTQ, 10.0), silent) == {"a": QAT, "b": PTQ}
    assert rounds.reasons["b"].startswith("unprofiled: step_ms is ")


def test_what_the_exporter_counted_is_the_first_guess(tmp_path: Path, bundle: Bundle) -> None:
    rounds = Rounds(made(tmp_path, bundle))
    rounds.next()
    assert rounds.state is not None
    assert rounds.state["devices"]["a"]["guess"] == pytest.approx(1.3)


def test_learning_needs_samples_on_the_gateway_and_says_so(tmp_path: Path, bundle: Bundle) -> None:
    assert "there is no gate.validation" in made(tmp_path, bundle).notes[0]
    assert not made(tmp_path, bundle, ("[assign]", '[gate]\nvalidation = "held_out.npz"\n[assign]')).notes
    assert not made(tmp_path, bundle, ("drop = 0.05", "drop = 0.05\nfine = { every = 0 }")).notes


def test_a_loss_counts_once_a_round(tmp_path: Path, bundle: Bundle) -> None:
    rounds = Rounds(made(tmp_path, bundle))
    rounds.next(loss=0.5)
    rounds.number -= 1
    rounds.next(loss=0.5)  # a device came late
    assert rounds.state is not None
    assert rounds.state["losses"] == [0.5]


POSITIVE = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(st.sampled_from([PTQ, QAT]), POSITIVE, POSITIVE), min_size=1, max_size=12))
@example([(PTQ, 1e300, 1.0), (QAT, 1e-300, 1.0)])
@example([(PTQ, 5e-324, 1.0)] * 12)
def test_no_number_of_a_device_stops_the_gateway(
    bundle: Bundle, tmp_path_factory: pytest.TempPathFactory, told: list[tuple[str, float, float]]
) -> None:
    """Times are whatever a device says; what is impossible is refused, or changes nobody's round but its own."""
    assigner = made(tmp_path_factory.mktemp("job"), bundle)
    state = None
    for number, (program, step_ms, seconds) in enumerate(told, 1):
        work = [
            Worked("odd", program, seconds, 10, {"step_ms": step_ms}),
            Worked("even", PTQ, 1.0, 10, {"step_ms": 5.0}),
        ]
        question = Question(number, 20, ["even", "odd"], frozenset(), work if number > 1 else [])
        answer = assigner.answer(state, question)
        state = json.loads(json.dumps(answer.state, allow_nan=False))
        assert set(answer.programs) == {"even", "odd"}


def test_a_device_that_comes_late_moves_nobody_else(bundle: Bundle, tmp_path: Path) -> None:
    assigner = made(tmp_path, bundle)
    first = assigner.answer(None, Question(1, 20, ["a", "b"], frozenset({"a", "b"})))
    work = [Worked(device, PTQ, 1.0, 10, {"step_ms": ms}) for device, ms in (("a", 5.0), ("b", 9.0))]
    second = assigner.answer(first.state, Question(2, 20, ["a", "b"], frozenset({"a", "b"}), work))
    late = assigner.answer(second.state, Question(2, 20, ["c"], frozenset({"a", "b", "c"})))
    assert set(late.programs) == {"c"}
    assert late.state is not None
    assert second.state is not None
    told = {device: late.state["told"][device] for device in ("a", "b")}
    assert told == second.state["told"]
    assert late.state["due"]  # at the next round everybody is looked at anew
    again = assigner.answer(late.state, Question(2, 20, ["a"], frozenset({"a", "b", "c"})))
    assert again.programs["a"] == second.programs["a"]
