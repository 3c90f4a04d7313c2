"""Buffered rounds: the work of a slow device counts later, and less."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from aggregator import rounds
from aggregator.job import JobError, load_job
from aggregator.rounds import Outcome, Phase, Settings
from edge_sdk import EdgeDevice
from tests.aggregator.test_rounds import CANDIDATE, DEVICES, MODEL, answers, drive, of, started
from tests.system.site import Site

BUFFERED = Settings(rounds=9, nonce="n", devices_wait=3, deadline_ms=1000, evaluates=False, buffer=2, max_staleness=1)
GATED = Settings(rounds=9, nonce="n", devices_wait=3, deadline_ms=1000, buffer=2, max_staleness=1)


def test_a_phase_closes_with_its_buffer_and_the_slow_device_keeps_its_task() -> None:
    state = started(BUFFERED)
    slow = state.tasks["d3"]
    state, effects = drive(state, *answers(state, ["d1", "d2"]))
    assert state.phase is Phase.MERGE
    assert of(effects, rounds.ClosePhase) == [rounds.ClosePhase(1, Phase.TRAIN, frozenset({"d3"}))]
    assert not of(effects, rounds.WithdrawTasks)
    state, effects = drive(state, rounds.Merged(20, CANDIDATE))
    assert (state.round, state.phase) == (2, Phase.TRAIN)
    (issue,) = of(effects, rounds.IssueTasks)
    assert isinstance(issue, rounds.IssueTasks)
    assert sorted(issue.tasks) == ["d1", "d2"]
    assert state.tasks["d3"] == slow
    assert (slow.round, slow.model) == (1, MODEL)


def test_a_late_update_counts_for_the_round_in_which_it_comes() -> None:
    state = started(BUFFERED)
    late = answers(state, ["d3"])
    state, _ = drive(state, *answers(state, ["d1", "d2"]), rounds.Merged(20, CANDIDATE))
    state, effects = drive(state, *late, *answers(state, ["d1"]))
    (merge,) = of(effects, rounds.Merge)
    assert isinstance(merge, rounds.Merge)
    assert (merge.round, merge.model) == (2, CANDIDATE)
    assert merge.tasks == {held.task for held in state.tasks.values() if held.answer is rounds.Answer.ANSWERED}
    assert {held.round for held in state.tasks.values() if held.task in merge.tasks} == {1, 2}


def test_an_update_that_comes_between_two_phases_waits_for_the_next() -> None:
    state = started(BUFFERED)
    late = answers(state, ["d3"])
    state, effects = drive(state, *answers(state, ["d1", "d2"]), *late)
    assert not of(effects, rounds.LeaveOut)
    state, _ = drive(state, rounds.Merged(20, CANDIDATE))
    state, effects = drive(state, *answers(state, ["d1"]))
    (merge,) = of(effects, rounds.Merge)
    assert isinstance(merge, rounds.Merge)
    assert (merge.round, merge.model) == (2, CANDIDATE)
    assert merge.tasks == {held.task for held in state.tasks.values() if held.answer is rounds.Answer.ANSWERED}
    assert {held.round for held in state.tasks.values() if held.task in merge.tasks} == {1, 2}


def test_a_task_that_is_too_old_is_withdrawn_and_its_device_gets_a_new_one() -> None:
    state = started(BUFFERED)
    old = state.tasks["d3"].task
    for number in (1, 2):
        state, effects = drive(state, *answers(state, ["d1", "d2"]), rounds.Merged(20 * number, CANDIDATE))
    assert of(effects, rounds.WithdrawTasks) == [rounds.WithdrawTasks(("d3",))]
    assert state.tasks["d3"].task != old
    assert state.tasks["d3"].round == 3
    _, effects = drive(state, rounds.UpdateAccepted(70, "d3", old))
    assert of(effects, rounds.LeaveOut) == [rounds.LeaveOut("d3", old, "phase_closed")]


def test_an_update_that_waited_until_it_was_too_old_is_left_out() -> None:
    settings = Settings(rounds=9, nonce="n", devices_wait=3, deadline_ms=1000, evaluates=False, buffer=2)  # staleness 0
    state = started(settings)
    late = answers(state, ["d3"])
    state, _ = drive(state, *answers(state, ["d1", "d2"]), *late)
    _, effects = drive(state, rounds.Merged(20, CANDIDATE))
    assert [type(effect) for effect in effects if isinstance(effect, rounds.LeaveOut)] == [rounds.LeaveOut]


def test_a_device_that_still_trains_is_not_asked_to_evaluate() -> None:
    state, _ = drive(started(GATED), *answers(started(GATED), DEVICES), rounds.Judged(20, True, ""))
    state, _ = drive(state, *answers(state, ["d1", "d2"]))
    state, effects = drive(state, rounds.Merged(40, CANDIDATE))
    assert sorted(state.tasks) == ["d1", "d2"]
    state, effects = drive(state, rounds.DeviceSeen(41, "d3"))
    assert not effects


def test_too_few_updates_are_kept_for_the_next_round_instead_of_set_aside() -> None:
    settings = Settings(
        rounds=9, nonce="n", devices_wait=3, minimum=2, deadline_ms=1000, evaluates=False, buffer=2, max_staleness=1
    )
    state = started(settings)
    state, effects = drive(state, *answers(state, ["d1"]), rounds.DeadlinePassed(1000))
    (finished,) = of(effects, rounds.FinishRound)
    assert isinstance(finished, rounds.FinishRound)
    assert finished.outcome is Outcome.TOO_FEW
    assert not of(effects, rounds.SetAside)
    state, effects = drive(state, *answers(state, ["d2"]))
    (merge,) = of(effects, rounds.Merge)
    assert isinstance(merge, rounds.Merge)
    assert len(merge.tasks or ()) == 2


_SCRIPT = st.lists(
    st.tuples(
        st.sampled_from(
            ["answer", "old answer", "seen", "lost", "decline", "deadline", "merged", "yes", "no", "restart"]
        ),
        st.sampled_from(DEVICES),
    ),
    max_size=80,
)


def _event(kind: str, device: str, task: str, now: int) -> rounds.Event:
    return {
        "answer": lambda: rounds.UpdateAccepted(now, device, task),
        "old answer": lambda: rounds.UpdateAccepted(now, device, task),
        "seen": lambda: rounds.DeviceSeen(now, device),
        "lost": lambda: rounds.DeviceLost(now, device),
        "decline": lambda: rounds.Declined(now, device, task, "busy"),
        "deadline": lambda: rounds.DeadlinePassed(now),
        "merged": lambda: rounds.Merged(now, f"{now:064x}"),
        "yes": lambda: rounds.Judged(now, True, ""),
        "no": lambda: rounds.Judged(now, False, ""),
        "restart": lambda: rounds.Restarted(now),
    }[kind]()


@hypothesis_settings(max_examples=300, deadline=None)
@given(_SCRIPT, st.booleans(), st.integers(0, 2), st.integers(1, 2))
def test_whatever_happens_no_task_is_counted_twice_and_none_too_late(
    script: list[tuple[str, str]], evaluates: bool, staleness: int, minimum: int
) -> None:
    settings = Settings(
        rounds=4, nonce="n", minimum=minimum, evaluates=evaluates, deadline_ms=100, buffer=2, max_staleness=staleness
    )
    state = rounds.initial(settings, MODEL)
    answered: set[str] = set()
    for now, (kind, device) in enumerate(script):
        held = state.carried.get(device) if kind == "old answer" else state.tasks.get(device)
        task = "f" * 16 if held is None else held.task
        if "answer" in kind and task in answered:
            continue  # the ledger takes a task once
        event = _event(kind, device, task, now)
        before = state
        state, effects = rounds.step(state, event)
        again = rounds.from_json(settings, json.loads(json.dumps(rounds.to_json(before))))
        assert rounds.step(again, event) == (state, effects)
        if "answer" in kind:
            answered.add(task)
        if state.phase is Phase.EVALUATE:
            busy = {d for d, held in state.carried.items() if held.answer is rounds.Answer.ISSUED}
            assert not state.tasks.keys() & busy
        if state.phase is Phase.TRAIN:
            assert all(state.round - held.round <= staleness for held in state.tasks.values())
            assert not state.carried


def test_a_buffer_below_the_minimum_and_staleness_without_a_buffer_are_refused(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a"], job={"round.max_staleness": 2})
    with pytest.raises(JobError, match=r"give round\.buffer too"):
        load_job(site.job)
    site.write_job({"round.buffer": 1, "round.minimum": 2})
    with pytest.raises(JobError, match=r"round\.buffer = 1 is below round\.minimum = 2"):
        load_job(site.job)


@pytest.mark.parametrize("gate", [True, False], ids=["with a gate", "without a gate"])
def test_three_devices_learn_in_buffered_rounds(tmp_path: Path, gate: bool) -> None:
    job = {"rounds": 6, "round.buffer": 1, "round.max_staleness": 2, "gate.enabled": gate, "task.steps": 40}
    site = Site(tmp_path, ["a", "b", "c"], job=job)
    with ExitStack() as stack:
        running = stack.enter_context(site.service())
        for name in site.ids:
            stack.enter_context(EdgeDevice.open(site.config(name))).start()
        status = running.wait()
    merges = [record.merge for record in status.history if record.merge]
    assert len(merges) == 6
    assert sum(merge["late"] for merge in merges) > 0
    assert status.duplicated == 0
    assert set(status.set_aside) <= {"phase_closed", "too_stale"}
