"""The device's side of the protocol, by plain calls: one row of the table each."""

from __future__ import annotations

from typing import Any

import pytest

from edge_sdk import conversation as talk
from edge_sdk import wire
from edge_sdk.conversation import Conversation, Effects, Head, LinkState, Stage, Work
from edge_sdk.wire import Order, Paused, Reason, State, Verdict

COMMON: dict[str, Any] = {"id": "0" * 16, "boot": "0" * 16, "at": 0}
BOOT = "b" * 16
FIRST, SECOND = (Head(f"00000000-0000000{n}-{n:012d}", str(n) * 64, 12) for n in (1, 2))


def play(*events: talk.Event, state: Conversation | None = None) -> tuple[Conversation, Effects]:
    """The state after all events, and the effects of the last."""
    state, effects = state or Conversation(BOOT, seed=1), ()
    for event in events:
        state, effects = talk.step(state, event)
    return state, effects


def online(*queue: Head, now: float = 0.0) -> Conversation:
    return play(talk.Started(now, queue), talk.LinkUp(now, session_present=False, receive_max=20))[0]


def ack(head: Head, status: Verdict, now: float = 1.0, **fields: Any) -> talk.AckReceived:
    return talk.AckReceived(now, wire.Ack(**COMMON, upload=head.upload, status=status, now=0, **fields))


def sync(now: float = 1.0, counter: int = 1, **args: Any) -> talk.CommandReceived:
    given = {"boot": BOOT, "connection": 1, **args}
    command = wire.Command(**COMMON, command=Order.SYNC, args=given, counter=counter, now=1_000_000)
    return talk.CommandReceived(now, command)


def task(name: str = "7" * 16, now: float = 1.0, refusal: str | None = None, **fields: Any) -> talk.TaskOffered:
    values = {
        "task": name,
        "round": 1,
        "program": "p",
        "start": "5" * 64,
        "start_bytes": 10,
        "base": "b" * 64,
        "deadline": 1_060_000,
        "now": 1_000_000,
        "steps": 1,
        "epochs": 0,
        "batch_size": 1,
        "learning_rate": 0.1,
        "hyper": {},
        "seed": 0,
        "encoding": {},
        **fields,
    }
    return talk.TaskOffered(now, wire.Task(**COMMON, **values), refusal, None)


def of(kind: type, effects: Effects) -> list[Any]:
    return [effect for effect in effects if isinstance(effect, kind)]


def test_a_connection_is_greeted_with_status_and_the_oldest_entry() -> None:
    _, effects = play(talk.Started(0, (FIRST, SECOND)), talk.LinkUp(0, session_present=False, receive_max=20))
    assert of(talk.Subscribe, effects)
    assert of(talk.PublishStatus, effects)
    assert of(talk.PublishOffer, effects) == [talk.PublishOffer(FIRST.upload)]


def test_every_connection_subscribes_whatever_session_the_broker_remembers() -> None:
    """The session may be one of an attempt whose CONNACK was lost: it knows of no subscription."""
    state, _ = play(sync(), talk.LinkDown(20, "cut"), talk.TimerFired(21, "connect"), state=online())
    _, effects = play(talk.LinkUp(21, session_present=True, receive_max=20), state=state)
    assert of(talk.Subscribe, effects)


def test_chunks_go_out_a_window_at_a_time_and_the_next_when_one_is_taken() -> None:
    need = ack(FIRST, Verdict.NEED, need=tuple(range(12)))
    state, effects = play(need, state=online(FIRST))
    assert [chunk.index for chunk in of(talk.SendChunk, effects)] == list(range(8))
    state, effects = play(talk.ChunkSent(2, FIRST.upload, 3), state=state)
    assert [chunk.index for chunk in of(talk.SendChunk, effects)] == [8]
    assert state.upload is not None
    assert state.upload.stage is Stage.SENDING


def test_a_small_receive_maximum_makes_a_small_window() -> None:
    state, _ = play(talk.Started(0, (FIRST,)), talk.LinkUp(0, session_present=True, receive_max=2))
    _, effects = play(ack(FIRST, Verdict.NEED, need=(0, 1, 2, 3)), state=state)
    assert len(of(talk.SendChunk, effects)) == 2


@pytest.mark.parametrize("reason", sorted(talk.DELETE))
def test_a_refusal_deletes_the_entry_and_offers_the_next(reason: Reason) -> None:
    _, effects = play(ack(FIRST, Verdict.REJECTED, reason=reason), state=online(FIRST, SECOND))
    assert of(talk.DeleteEntry, effects) == [talk.DeleteEntry(FIRST.upload, "rejected")]
    assert of(talk.PublishOffer, effects) == [talk.PublishOffer(SECOND.upload)]


@pytest.mark.parametrize("reason", sorted(talk.QUARANTINE))
def test_a_refusal_that_needs_a_person_keeps_the_offer_aside(reason: Reason) -> None:
    _, effects = play(ack(FIRST, Verdict.REJECTED, reason=reason), state=online(FIRST))
    assert of(talk.Quarantine, effects) == [talk.Quarantine(FIRST.upload, reason)]
    assert not of(talk.DeleteEntry, effects)


@pytest.mark.parametrize("reason", sorted(set(Reason) - talk.DELETE - talk.QUARANTINE))
def test_any_other_refusal_keeps_the_entry_and_lets_the_next_go_first(reason: Reason) -> None:
    state, effects = play(ack(FIRST, Verdict.REJECTED, reason=reason), state=online(FIRST, SECOND))
    assert not of(talk.DeleteEntry, effects)
    assert state.queue == (FIRST, SECOND)
    assert of(talk.PublishOffer, effects) == [talk.PublishOffer(SECOND.upload)]


def test_a_verdict_on_another_body_of_that_name_is_ignored() -> None:
    state, effects = play(ack(FIRST, Verdict.ACCEPTED, digest="f" * 64), state=online(FIRST))
    assert effects == ()
    assert state.queue == (FIRST,)


def test_silence_is_answered_with_the_same_offer_at_growing_intervals_up_to_a_minute() -> None:
    state, delays = online(FIRST), []
    for now in range(0, 600, 60):
        state, effects = play(talk.TimerFired(float(now), "verdict"), state=state)
        assert of(talk.PublishOffer, effects) == [talk.PublishOffer(FIRST.upload)]
        delays += [timer.delay for timer in of(talk.SetTimer, effects) if timer.name == "verdict"]
    assert min(delays) == delays[0] < 4.0
    assert 20.0 < max(delays) <= 60.0


def test_a_lost_link_is_tried_again_at_jittered_intervals_up_to_a_minute() -> None:
    state, waits = online(now=0.0), []
    for now in range(20, 40):
        state, effects = play(talk.LinkDown(float(now), "refused"), state=state)
        waits += [timer.delay for timer in of(talk.SetTimer, effects) if timer.name == "connect"]
        state, _ = play(talk.TimerFired(float(now), "connect"), state=state)
    assert waits[0] <= 5.0
    assert 20.0 < max(waits) <= 60.0
    assert len(set(waits)) == len(waits)


def test_nothing_is_trained_before_the_gateway_has_told_the_time() -> None:
    state, effects = play(task(), state=online())
    assert (state.work, of(talk.StartTask, effects)) == (Work.READY, [])
    state, effects = play(sync(), state=state)
    assert (state.work, len(of(talk.StartTask, effects))) == (Work.TRAINING, 1)


def test_a_sync_for_an_earlier_connection_tells_nothing() -> None:
    state, effects = play(task(), sync(connection=0), state=online())
    assert not state.synced
    assert not of(talk.StartTask, effects)


def test_a_command_counts_once() -> None:
    state, _ = play(sync(counter=5), state=online())
    assert play(sync(counter=5), state=state)[1] == ()


def test_a_task_past_its_deadline_or_of_an_earlier_round_is_not_begun() -> None:
    state, _ = play(sync(), talk.RoundSeen(1, 3, opened=1_000_500, model=None), state=online())
    assert play(task(), state=state)[0].task is None
    assert play(task(deadline=999_000, now=1_000_600), state=state)[0].task is None
    assert play(task(), state=online())[0].task is not None


def test_a_newer_task_cancels_the_one_that_runs() -> None:
    state, _ = play(sync(), task(), state=online())
    state, effects = play(task("8" * 16), state=state)
    assert of(talk.CancelTask, effects) == [talk.CancelTask("7" * 16)]
    assert [effect.task.task for effect in of(talk.StartTask, effects)] == ["8" * 16]


def test_a_closed_gate_holds_training_back_until_it_opens() -> None:
    state, _ = play(sync(), talk.Gate(1, Paused.HEAT), task(), state=online())
    assert state.work is Work.READY
    _, effects = play(talk.Gate(2, Paused.NONE), state=state)
    assert of(talk.StartTask, effects)


def test_what_was_declined_without_a_link_is_said_when_there_is_one() -> None:
    state, _ = play(sync(), task(), talk.LinkDown(2, "cut"), talk.TaskFailed(3, "7" * 16, "no samples"), state=online())
    state, effects = play(
        talk.TimerFired(9, "connect"), talk.LinkUp(9, session_present=True, receive_max=20), state=state
    )
    assert of(talk.PublishStatus, effects) == [talk.PublishStatus(State.ONLINE, ("7" * 16, "no samples"))]
    state, _ = play(task("8" * 16), talk.LinkDown(20, "cut"), talk.TimerFired(29, "connect"), state=state)
    _, effects = play(talk.LinkUp(29, session_present=True, receive_max=20), state=state)
    assert of(talk.PublishStatus, effects) == [talk.PublishStatus(State.ONLINE)]


def test_connections_that_do_not_last_are_reported() -> None:
    state, told = online(), []
    for now in (1.0, 2.0, 3.0):
        state, effects = play(talk.LinkDown(now, "gone"), state=state)
        told += [note.detail for note in of(talk.Notify, effects) if note.kind == "error"]
        state, _ = play(talk.TimerFired(now, "connect"), talk.LinkUp(now, True, 20), state=state)
    assert told == ["3 connections in a row ended within 10 s: does another device use this id?"]


def test_after_stop_nothing_happens() -> None:
    state, effects = play(talk.Stop(1), state=online(FIRST))
    assert of(talk.Disconnect, effects)
    assert state.link is LinkState.STOPPING
    assert play(ack(FIRST, Verdict.ACCEPTED), state=state)[1] == ()
