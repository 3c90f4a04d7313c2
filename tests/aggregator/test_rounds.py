"""The round machine, by plain calls."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from aggregator import rounds
from aggregator.rounds import Answer, Outcome, Phase, Rounds, Settings

MODEL, CANDIDATE = "0" * 64, "c" * 64
DEVICES = ("d1", "d2", "d3")


def drive(state: Rounds, *events: rounds.Event) -> tuple[Rounds, list[rounds.Effect]]:
    effects: list[rounds.Effect] = []
    for event in events:
        state, new = rounds.step(state, event)
        effects += new
    return state, effects


def started(settings: Settings, devices: Sequence[str] = DEVICES, now: int = 0) -> Rounds:
    state = rounds.initial(settings, MODEL)
    return drive(state, rounds.Restarted(now), *(rounds.DeviceSeen(now, device) for device in devices))[0]


def answers(state: Rounds, devices: Sequence[str], now: int = 10) -> list[rounds.Event]:
    return [rounds.UpdateAccepted(now, device, state.tasks[device].task) for device in devices]


def of(effects: Sequence[rounds.Effect], kind: type[rounds.Effect]) -> list[rounds.Effect]:
    return [effect for effect in effects if isinstance(effect, kind)]


GATED = Settings(rounds=2, nonce="n", devices_wait=3, deadline_ms=1000)
UNGATED = Settings(rounds=2, nonce="n", devices_wait=3, deadline_ms=1000, evaluates=False)


def test_round_zero_measures_the_initial_model_before_anything_is_trained() -> None:
    state = started(GATED)
    assert (state.round, state.phase, state.candidate) == (0, Phase.EVALUATE, MODEL)
    state, effects = drive(state, *answers(state, DEVICES))
    assert of(effects, rounds.Judge) == [rounds.Judge(0, MODEL, MODEL)]
    state, effects = drive(state, rounds.Judged(20, True, "measured"))
    assert of(effects, rounds.FinishRound) == [rounds.FinishRound(0, Outcome.MEASURED, "measured", MODEL)]
    assert (state.round, state.phase) == (1, Phase.TRAIN)


def test_a_round_goes_from_training_over_the_merge_to_the_gate_and_the_next_round() -> None:
    state, _ = drive(started(GATED), *answers(started(GATED), DEVICES), rounds.Judged(20, True, ""))
    state, effects = drive(state, *answers(state, DEVICES, 30))
    assert of(effects, rounds.Merge) == [rounds.Merge(1, MODEL)]
    state, effects = drive(state, rounds.Merged(40, CANDIDATE))
    assert state.phase is Phase.EVALUATE
    (issue,) = of(effects, rounds.IssueTasks)
    assert isinstance(issue, rounds.IssueTasks)
    assert (issue.start, issue.deadline) == (CANDIDATE, state.deadline)
    state, effects = drive(state, *answers(state, DEVICES, 50))
    assert of(effects, rounds.Judge) == [rounds.Judge(1, MODEL, CANDIDATE)]
    state, effects = drive(state, rounds.Judged(60, True, "better"))
    assert of(effects, rounds.FinishRound) == [rounds.FinishRound(1, Outcome.ACCEPTED, "better", CANDIDATE)]
    assert (state.round, state.model) == (2, CANDIDATE)


def test_a_worse_candidate_is_rolled_back_with_its_reason() -> None:
    state, _ = drive(started(GATED), *answers(started(GATED), DEVICES), rounds.Judged(20, True, ""))
    state, _ = drive(state, *answers(state, DEVICES, 30))
    state, _ = drive(state, rounds.Merged(40, CANDIDATE))
    state, effects = drive(state, *answers(state, DEVICES, 50), rounds.Judged(60, False, "0.5 after 0.8"))
    assert of(effects, rounds.FinishRound) == [rounds.FinishRound(1, Outcome.ROLLED_BACK, "0.5 after 0.8", MODEL)]
    assert (state.round, state.model) == (2, MODEL)


def test_without_a_gate_the_merge_ends_the_round_and_the_job_ends_after_its_rounds() -> None:
    state = started(UNGATED)
    assert (state.round, state.phase) == (1, Phase.TRAIN)
    for number in (1, 2):
        state, _ = drive(state, *answers(state, DEVICES))
        state, effects = drive(state, rounds.Merged(20, CANDIDATE))
        assert of(effects, rounds.FinishRound) == [
            rounds.FinishRound(number, Outcome.ACCEPTED, "the job has no gate", CANDIDATE)
        ]
    assert state.phase is Phase.DONE
    assert of(effects, rounds.FinishJob) == [rounds.FinishJob(CANDIDATE)]


def test_a_quorum_closes_the_phase_early_and_later_updates_are_left_out() -> None:
    state = started(Settings(rounds=1, nonce="n", devices_wait=3, quorum=2, evaluates=False))
    late = answers(state, ["d3"])
    state, effects = drive(state, *answers(state, ["d1", "d2"]))
    assert state.phase is Phase.MERGE
    assert of(effects, rounds.WithdrawTasks) == [rounds.WithdrawTasks(("d3",))]
    _, effects = drive(state, *late)
    assert [type(effect) for effect in effects] == [rounds.LeaveOut]


def test_the_phases_take_their_deadlines_from_the_deadline_of_the_round() -> None:
    state, _ = drive(started(GATED), *answers(started(GATED), DEVICES), rounds.Judged(100, True, ""))
    assert (state.deadline, state.phase_deadline) == (1100, 800)
    state, _ = drive(state, *answers(state, ["d1"], 200), rounds.DeadlinePassed(800), rounds.Merged(801, CANDIDATE))
    assert (state.phase, state.phase_deadline) == (Phase.EVALUATE, 1101)


def test_a_round_without_updates_is_empty_and_the_model_stays() -> None:
    state, effects = drive(started(UNGATED), rounds.DeadlinePassed(1000))
    (finished,) = of(effects, rounds.FinishRound)
    assert isinstance(finished, rounds.FinishRound)
    assert (finished.outcome, finished.model) == (Outcome.EMPTY, MODEL)
    assert (state.round, state.phase) == (2, Phase.TRAIN)


def test_fewer_updates_than_the_minimum_are_set_aside() -> None:
    state = started(Settings(rounds=1, nonce="n", devices_wait=3, minimum=2, evaluates=False))
    state, effects = drive(state, *answers(state, ["d1"]), rounds.DeadlinePassed(10**6))
    assert of(effects, rounds.SetAside) == [rounds.SetAside(1, Phase.TRAIN, "too_few_updates")]
    (finished,) = of(effects, rounds.FinishRound)
    assert isinstance(finished, rounds.FinishRound)
    assert finished.outcome is Outcome.TOO_FEW


def test_a_failed_merge_keeps_the_model_and_goes_on() -> None:
    state = started(UNGATED)
    state, effects = drive(state, *answers(state, DEVICES), rounds.MergeFailed(30, "no rank"))
    assert of(effects, rounds.SetAside) == [rounds.SetAside(1, Phase.TRAIN, "merge_failed")]
    assert (state.round, state.model, state.phase) == (2, MODEL, Phase.TRAIN)


def test_devices_that_decline_do_not_hold_up_the_round() -> None:
    state = started(UNGATED)
    state, _ = drive(
        state, *answers(state, ["d1", "d2"]), rounds.Declined(9, "d3", state.tasks["d3"].task, "no samples")
    )
    assert state.phase is Phase.MERGE


def test_an_update_that_comes_after_its_task_was_declined_counts_while_the_phase_is_open() -> None:
    state = started(UNGATED)
    state, _ = drive(state, rounds.Declined(9, "d3", state.tasks["d3"].task, "update refused"), *answers(state, ["d3"]))
    assert (state.tasks["d3"].answer, state.count(Answer.DECLINED)) == (Answer.ANSWERED, 0)


def declined_by(state: Rounds, devices: Sequence[str], now: int = 9) -> list[rounds.Event]:
    return [rounds.Declined(now, device, state.tasks[device].task, "no samples") for device in devices]


def test_a_round_that_all_decline_ends_at_once_with_their_reasons_and_does_not_count() -> None:
    state = started(UNGATED)
    state, effects = drive(state, *declined_by(state, DEVICES))
    (finished,) = of(effects, rounds.FinishRound)
    assert isinstance(finished, rounds.FinishRound)
    assert finished.outcome is Outcome.EMPTY
    assert finished.reason == "0 of at least 1 updates arrived; d1: no samples; d2: no samples; d3: no samples"
    assert (state.round, state.uncounted, state.phase) == (2, 1, Phase.WAIT)
    closed = [effect for effect in effects if isinstance(effect, rounds.ClosePhase)]
    assert [sorted(effect.declined) for effect in closed] == [list(DEVICES)]


def test_devices_that_declined_are_asked_again_after_a_pause() -> None:
    state = started(UNGATED)
    state, effects = drive(state, *declined_by(state, DEVICES), rounds.DeviceSeen(10, "d1"))
    assert effects[-1] == rounds.SetDeadline(1009)  # a second, at least
    assert state.phase is Phase.WAIT
    state, effects = drive(state, rounds.DeadlinePassed(1009))
    assert state.phase is Phase.TRAIN
    assert len(of(effects, rounds.IssueTasks)) == 1
    for number in (2, 3):  # the job has two rounds, whatever its devices declined
        assert state.round == number
        state, _ = drive(state, *answers(state, DEVICES), rounds.Merged(1020, CANDIDATE))
    assert state.phase is Phase.DONE


def test_a_device_that_comes_ends_the_pause() -> None:
    state = started(UNGATED)
    state, _ = drive(state, *declined_by(state, DEVICES))
    again, _ = drive(rounds.from_json(UNGATED, rounds.to_json(state)), rounds.Restarted(10))
    assert again.phase is Phase.WAIT
    again, _ = drive(again, rounds.DeviceSeen(11, "d4"))
    assert (again.phase, len(again.tasks)) == (Phase.TRAIN, 4)


def test_pauses_grow_up_to_the_deadline_of_a_round() -> None:
    settings = Settings(rounds=1, nonce="n", devices_wait=3, deadline_ms=100_000, evaluates=False)
    state, now, pauses = started(settings), 0, []
    for _ in range(22):
        state, effects = drive(state, *declined_by(state, DEVICES, now))
        (timer,) = [effect for effect in effects if isinstance(effect, rounds.SetDeadline)]
        assert timer.at is not None
        pauses.append(timer.at - now)
        now = timer.at
        state, _ = drive(state, rounds.DeadlinePassed(now))
    assert pauses[:3] == [5_000, 10_000, 15_000]
    assert pauses[-3:] == [100_000] * 3


def test_a_phase_waits_for_others_when_fewer_than_the_minimum_were_asked() -> None:
    state = started(Settings(rounds=1, nonce="n", minimum=2, evaluates=False), ["d1"])
    state, _ = drive(state, *answers(state, ["d1"]))
    assert state.phase is Phase.TRAIN
    state, _ = drive(state, rounds.DeviceSeen(20, "d2"))
    state, effects = drive(state, *declined_by(state, ["d2"], 30))
    assert of(effects, rounds.SetAside) == [rounds.SetAside(1, Phase.TRAIN, "too_few_updates")]
    assert (state.round, state.uncounted) == (2, 1)


def test_an_initial_model_that_nobody_can_measure_is_measured_when_they_can() -> None:
    state = started(GATED)
    state, _ = drive(state, *declined_by(state, DEVICES), rounds.Judged(20, True, "0 devices"))
    assert (state.round, state.phase) == (1, Phase.MEASURE)
    state, _ = drive(state, *declined_by(state, DEVICES, 30))
    assert (state.round, state.phase) == (1, Phase.TRAIN)
    state, _ = drive(state, *declined_by(state, DEVICES, 40), rounds.DeadlinePassed(1040))
    assert (state.round, state.phase) == (2, Phase.MEASURE)
    state, _ = drive(state, *answers(state, DEVICES, 1050))
    assert (state.phase, state.measures) == (Phase.TRAIN, False)


def test_after_a_rollback_the_model_is_measured_again_before_one_trains() -> None:
    state, _ = drive(started(GATED), *answers(started(GATED), DEVICES), rounds.Judged(20, True, ""))
    state, _ = drive(state, *answers(state, DEVICES, 30), rounds.Merged(40, CANDIDATE))
    state, effects = drive(state, *answers(state, DEVICES, 50), rounds.Judged(60, False, "worse"))
    (issue,) = of(effects, rounds.IssueTasks)
    assert isinstance(issue, rounds.IssueTasks)
    assert (issue.round, issue.phase, issue.start) == (2, Phase.MEASURE, MODEL)
    assert (state.phase_deadline, state.deadline) == (60 + 300, 1060)
    state, _ = drive(state, rounds.DeadlinePassed(360))
    assert (state.phase, state.phase_deadline) == (Phase.TRAIN, 760)
    state, _ = drive(state, *answers(state, DEVICES, 400), rounds.Merged(410, CANDIDATE))
    state, _ = drive(state, *answers(state, DEVICES, 420), rounds.Judged(430, True, "better"))
    assert (state.phase, state.model, state.measures) == (Phase.DONE, CANDIDATE, False)


def test_a_lost_device_does_not_stop_the_round() -> None:
    state, _ = drive(started(UNGATED), rounds.DeviceLost(5, "d3"))
    assert "d3" in state.tasks  # it may come back with its update
    state, _ = drive(state, *answers(state, ["d1", "d2"]), rounds.DeadlinePassed(1000))
    assert state.phase is Phase.MERGE


@pytest.mark.parametrize(("now", "gets_one"), [(500, True), (501, False)])
def test_a_device_that_comes_late_gets_a_task_while_half_of_the_time_is_left(now: int, gets_one: bool) -> None:
    state, effects = drive(started(UNGATED), rounds.DeviceSeen(now, "d4"))
    assert bool(of(effects, rounds.IssueTasks)) is gets_one
    assert ("d4" in state.tasks) is gets_one


def test_a_round_opens_with_fewer_devices_when_the_others_do_not_come() -> None:
    state = started(UNGATED, ["d1"])
    assert state.phase is Phase.WAIT
    opened, _ = drive(state, rounds.DeadlinePassed(1000))
    assert opened.phase is Phase.TRAIN
    alone, _ = drive(started(UNGATED, []), rounds.DeadlinePassed(1000))
    assert alone.phase is Phase.WAIT
    opened, _ = drive(alone, rounds.DeviceSeen(5000, "d1"))
    assert opened.phase is Phase.TRAIN


def test_a_finished_job_goes_on_when_its_file_asks_for_more_rounds() -> None:
    state = started(Settings(rounds=1, nonce="n", devices_wait=3, evaluates=False))
    state, _ = drive(state, *answers(state, DEVICES))
    state, _ = drive(state, rounds.Merged(20, CANDIDATE))
    assert state.phase is Phase.DONE
    more = rounds.from_json(UNGATED, rounds.to_json(state))
    more, effects = drive(more, rounds.Restarted(50))
    assert (more.round, more.phase) == (2, Phase.TRAIN)
    assert not of(effects, rounds.FinishJob)


def test_task_ids_differ_between_journals_rounds_phases_openings_and_devices() -> None:
    ids = {
        rounds.task_id(Settings(rounds=1, nonce=nonce), number, phase, opened, device)
        for opened in (1_764_000_000_000, 1_764_000_000_001)
        for nonce in "ab"
        for number in (1, 2)
        for phase in (Phase.TRAIN, Phase.EVALUATE)
        for device in DEVICES
    }
    assert len(ids) == 48


_EVENTS = st.one_of(
    st.tuples(st.sampled_from(["seen", "lost", "answer", "decline", "discard"]), st.sampled_from(DEVICES)),
    st.tuples(st.sampled_from(["deadline", "merged", "merge_failed", "yes", "no", "restart"]), st.just("")),
)


def _event(state: Rounds, kind: str, device: str, now: int) -> rounds.Event:
    task = state.tasks[device].task if device in state.tasks else "f" * 16
    return {
        "seen": lambda: rounds.DeviceSeen(now, device),
        "lost": lambda: rounds.DeviceLost(now, device),
        "answer": lambda: rounds.UpdateAccepted(now, device, task),
        "discard": lambda: rounds.Discarded(now, device, merged=now % 2 == 0),
        "decline": lambda: rounds.Declined(now, device, task, "busy"),
        "deadline": lambda: rounds.DeadlinePassed(now),
        "merged": lambda: rounds.Merged(now, f"{now:064x}"),
        "merge_failed": lambda: rounds.MergeFailed(now, "x"),
        "yes": lambda: rounds.Judged(now, True, ""),
        "no": lambda: rounds.Judged(now, False, ""),
        "restart": lambda: rounds.Restarted(now),
    }[kind]()


@hypothesis_settings(max_examples=300, deadline=None)
@given(st.lists(_EVENTS, max_size=60), st.booleans(), st.integers(1, 3))
def test_whatever_happens_rounds_end_in_order_and_each_has_one_outcome(
    script: list[tuple[str, str]], evaluates: bool, minimum: int
) -> None:
    settings = Settings(rounds=3, nonce="n", minimum=minimum, evaluates=evaluates, deadline_ms=100)
    state, finished, accepted = rounds.initial(settings, MODEL), [], MODEL
    for now, (kind, device) in enumerate(script):
        before = state
        state, effects = rounds.step(state, _event(state, kind, device, now))
        if kind == "restart":  # what the journal holds is enough to go on
            again = rounds.from_json(settings, json.loads(json.dumps(rounds.to_json(before))))
            assert rounds.step(again, rounds.Restarted(now)) == (state, effects)
        for effect in effects:
            if isinstance(effect, rounds.FinishRound):
                finished.append(effect.round)
                if effect.outcome is not Outcome.ACCEPTED:
                    assert effect.model == accepted
                accepted = effect.model
        assert state.model == accepted
    first = 0 if evaluates else 1
    assert finished == list(range(first, first + len(finished)))
    assert all(number - state.uncounted <= settings.rounds for number in finished)
