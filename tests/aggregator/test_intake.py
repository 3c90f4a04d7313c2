"""The gateway's side of an upload, by plain calls and by random networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from aggregator import intake, rounds
from aggregator.intake import Intake, IssuedTask, Limits, OpenUpload, SendAck
from edge_sdk import wire

NONCE, BASE, START = "n", "b" * 64, "5" * 64
OUTBOX = "0badcafe00000000"
LIMITS = Limits(chunk=4, need=3, open_uploads=2, part_bytes=100, update_bytes=64)
SETTINGS = rounds.Settings(rounds=9, nonce=NONCE)


def task_of(device: str, number: int = 1) -> str:
    return rounds.task_id(SETTINGS, number, rounds.Phase.TRAIN, 1000 * number, device)


def issued(device: str, number: int = 1) -> IssuedTask:
    return IssuedTask(task_of(device, number), number, "train", START, BASE, update_bytes=40, deadline=600_000)


COMMON = {"id": "0" * 16, "boot": "1" * 16, "at": 0}


def make_offer(fields: dict[str, Any]) -> wire.Offer:
    return wire.Offer(**{**COMMON, **fields})


def make_status(fields: dict[str, Any]) -> wire.Status:
    return wire.Status(**{**COMMON, "bundle": "b" * 64, **fields})


def offer(device: str = "d1", seq: int = 1, **changes: Any) -> wire.Offer:
    digest = changes.pop("digest", "d" * 64)
    fields = {
        "upload": f"{OUTBOX[:8]}-{seq:08d}-{digest[:12]}",
        "outbox_id": OUTBOX,
        "task": task_of(device),
        "seq": seq,
        "round": 1,
        "size": 18,
        "num_examples": 5,
        "base": BASE,
        "digest": digest,
        "chunk": 4,
        "chunks": 5,
        "metrics": {"loss": 1.0},
    }
    return make_offer({**fields, **changes})


def opened(*devices: str, limits: Limits = LIMITS) -> Intake:
    state = intake.initial(limits, NONCE)
    state, _ = intake.step(state, intake.Restarted(0, (), ()))
    return intake.step(state, intake.TasksIssued(0, {device: issued(device) for device in devices}))[0]


def offered(state: Intake, item: wire.Offer, device: str = "d1", now: int = 0, **known: Any) -> Any:
    known.setdefault("signature_ok", True)
    return intake.step(state, intake.Offered(now, device, item, **known))


def chunk(state: Intake, index: int, device: str = "d1", name: str | None = None, size: int | None = None) -> Any:
    length = (2 if index == 4 else 4) if size is None else size
    return intake.step(state, intake.ChunkArrived(0, device, name or offer(device).upload, index, length))


def acks(effects: Sequence[intake.Effect]) -> list[tuple[str, Any]]:
    return [
        (ack.status, ack.need if ack.status == "need" else ack.reason) for ack in effects if isinstance(ack, SendAck)
    ]


def kinds(effects: Sequence[intake.Effect]) -> list[str]:
    return [type(effect).__name__ for effect in effects]


def test_a_good_offer_is_stored_before_chunks_are_asked_for() -> None:
    _, effects = offered(opened("d1"), offer())
    assert kinds(effects) == ["StoreOffer", "SendAck"]
    assert acks(effects) == [("need", (0, 1, 2))]


def test_chunks_are_asked_for_again_when_half_of_the_list_is_in_and_never_twice() -> None:
    state, _ = offered(opened("d1"), offer())
    state, effects = chunk(state, 0)
    assert acks(effects) == []
    state, effects = chunk(state, 1)
    assert acks(effects) == [("need", (2, 3, 4))]
    state, effects = chunk(state, 1)
    assert effects == ()


def test_an_upload_is_verified_when_complete_and_accepted_when_verified() -> None:
    state, _ = offered(opened("d1"), offer())
    for index in (3, 1, 4, 0):
        state, effects = chunk(state, index)
    state, effects = chunk(state, 2)
    assert kinds(effects) == ["StoreChunk", "Verify"]
    state, effects = intake.step(state, intake.Verified(9, "d1", offer().upload, norm=1.0))
    assert kinds(effects) == ["Accept", "Tell", "SendAck"]
    assert effects[1].event == rounds.UpdateAccepted(9, "d1", task_of("d1"))
    assert acks(effects) == [("accepted", None)]
    assert state.uploads == {}


def told(effects: Sequence[intake.Effect]) -> list[rounds.Event]:
    return [effect.event for effect in effects if isinstance(effect, intake.Tell)]


def declined(reason: str, now: int = 0) -> rounds.Declined:
    return rounds.Declined(now, "d1", task_of("d1"), f"update refused: {reason}")


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("another key", {}, {"signature_ok": False}, "bad_signature"),
    ("another body under an accepted number", {}, {"recorded": "e" * 64}, "seq_conflict"),
    ("a number that is closed since long", {}, {"floor": 7}, "round_closed"),
    ("the task of another device", {"task": task_of("d2")}, {}, "foreign_task"),
    ("the task of another gateway", {"task": "f" * 16}, {}, "foreign_task"),
    ("a task that was answered", {}, {"answered": True}, "already_answered"),
    ("a task of a closed round", {"task": task_of("d1", 7), "round": 7}, {}, "round_closed"),
    ("another base", {"base": "c" * 64}, {}, "wrong_base"),
    ("more bytes than its program can yield", {"size": 41, "chunks": 11}, {}, "too_large"),
    ("one gibibyte", {"size": 1 << 30, "chunks": 1 << 28}, {}, "too_large"),
    ("too few chunks", {"chunks": 4}, {}, "bad_geometry"),
    ("other chunks", {"chunk": 8, "chunks": 3}, {}, "bad_geometry"),
    ("no examples", {"num_examples": 0}, {}, "bad_content"),
]


@pytest.mark.parametrize(("changes", "known", "reason"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_an_offer_is_refused_with_its_reason_and_nothing_is_stored(
    changes: dict[str, Any], known: dict[str, Any], reason: str
) -> None:
    state, effects = offered(opened("d1", "d2"), offer(**changes), **known)
    assert acks(effects) == [("rejected", reason)]
    assert "Refuse" in kinds(effects)
    assert "StoreOffer" not in kinds(effects)
    assert ("Alarm" in kinds(effects)) == (reason in ("bad_signature", "seq_conflict"))
    assert state.uploads == {}
    # Nobody waits for an answer that was refused; what is unsigned, or about another task, decides nothing.
    was_its_answer = "task" not in changes and known.get("signature_ok", True) and not known.get("answered", False)
    assert told(effects) == ([declined(reason)] if was_its_answer else [])


def test_an_offer_that_is_in_the_ledger_is_accepted_again_without_storing_anything() -> None:
    _, effects = offered(opened(), offer(), recorded="d" * 64)
    assert kinds(effects) == ["SendAck"]
    assert acks(effects) == [("accepted", None)]


def test_offers_beyond_the_budget_wait_and_the_wait_is_spread() -> None:
    state = opened("d1", "d2", "d3", "d4")
    delays = []
    for device in ("d1", "d2", "d3", "d4"):
        state, effects = offered(state, offer(device), device)
        delays += [ack.retry_after_ms for ack in effects if isinstance(ack, SendAck) and ack.status == "wait"]
    assert len(state.uploads) == 2
    assert delays == sorted(set(delays))
    assert len(delays) == 2


def test_a_full_disk_makes_offers_wait_until_there_is_room_again() -> None:
    state, _ = offered(opened("d1", "d2"), offer())
    state, effects = intake.step(state, intake.StorageChanged(1, full=True))
    assert kinds(effects) == ["Alarm"]
    state, effects = offered(state, offer("d2"), "d2")
    assert acks(effects) == [("wait", None)]
    state, effects = chunk(state, 0)
    assert effects == ()
    state, effects = intake.step(state, intake.StorageChanged(2, full=False))
    assert acks(effects) == [("need", (0, 1, 2))]


def test_repeated_offers_are_rationed_but_the_first_for_an_open_task_is_free() -> None:
    state = opened("d1")
    for now in range(12):
        state, effects = offered(state, offer(base="c" * 64, seq=now + 1), now=now, answered=True)
        assert acks(effects) == [("rejected", "already_answered")]
    state, effects = offered(state, offer(seq=20), now=13, answered=True)
    assert acks(effects) == [("wait", None)]
    state, effects = offered(state, offer(seq=21), now=14)
    assert acks(effects) == [("need", (0, 1, 2))]


def test_sixteen_wrong_chunks_end_an_upload_with_an_alarm() -> None:
    state, _ = offered(opened("d1"), offer())
    for _ in range(15):
        state, effects = chunk(state, 99)
        assert effects == ()
    state, effects = chunk(state, 0, size=3)
    assert kinds(effects) == ["DropOffer", "Refuse", "Alarm", "Tell", "SendAck"]
    assert told(effects) == [declined("bad_geometry")]
    state, effects = chunk(state, 0)
    assert (effects, state.ignored["orphan_chunk"]) == ((), 1)


def test_a_wrong_digest_starts_the_transfer_again_once() -> None:
    state, _ = offered(opened("d1"), offer())
    for _ in range(2):
        for index in range(5):
            state, effects = chunk(state, index)
        assert "Verify" in kinds(effects)
        state, effects = intake.step(state, intake.VerifyFailed(1, "d1", offer().upload, "digest", again=True))
    assert kinds(effects) == ["DropOffer", "Refuse", "Tell", "SendAck"]
    assert acks(effects) == [("rejected", "bad_content")]


def test_bad_content_is_refused_at_once() -> None:
    state, _ = offered(opened("d1"), offer())
    for index in range(5):
        state, _ = chunk(state, index)
    _, effects = intake.step(state, intake.VerifyFailed(1, "d1", offer().upload, "NaN", again=False))
    assert acks(effects) == [("rejected", "bad_content")]
    assert told(effects) == [declined("bad_content", now=1)]


def test_a_refused_offer_beside_an_upload_of_the_same_task_declines_nothing() -> None:
    state, _ = offered(opened("d1"), offer())
    _, effects = offered(state, offer(base="c" * 64, seq=2))
    assert acks(effects) == [("rejected", "wrong_base")]
    assert told(effects) == []


def test_a_silent_upload_is_asked_three_times_and_then_reaped() -> None:
    state, _ = offered(opened("d1"), offer())
    asked = 0
    for now in range(0, 149_000, 1000):
        state, effects = intake.step(state, intake.Ticked(now))
        asked += len(acks(effects))
    assert (asked, len(state.uploads)) == (3, 1)
    state, effects = intake.step(state, intake.Ticked(151_000))
    assert (kinds(effects), state.uploads) == (["DropOffer"], {})


def test_closing_a_phase_drops_open_uploads_and_finishes_those_being_verified() -> None:
    state, _ = offered(opened("d1", "d2"), offer())
    for index in range(5):
        state, _ = chunk(state, index)
    state, _ = offered(state, offer("d2"), "d2")
    state, effects = intake.step(state, intake.PhaseClosed(1))
    assert effects == (intake.DropOffer("d2", offer("d2").upload),)
    _, effects = intake.step(state, intake.Verified(9, "d1", offer().upload))
    assert "Accept" in kinds(effects)


def test_a_second_outbox_waits_while_the_first_one_answers_the_task() -> None:
    state, _ = offered(opened("d1"), offer())
    _, effects = offered(state, offer(outbox_id="1" * 16, upload=f"11111111-{1:08d}-{'d' * 12}"))
    assert acks(effects) == [("wait", None)]


def test_only_announced_models_are_served_and_only_a_window_of_them() -> None:
    state, _ = intake.step(opened("d1"), intake.PhaseOpened(0, frozenset({"a" * 64})))
    for digest, count in (("a" * 64, 3), (START, 3), ("9" * 64, 0)):
        _, effects = intake.step(state, intake.FetchAsked(0, "d1", digest, ((0, 2),), size=10**6))
        assert len(effects) == count
    _, effects = intake.step(state, intake.FetchAsked(0, "d1", START, ((0, 10**9),), size=10**6))
    assert len(effects) == LIMITS.window
    _, effects = intake.step(state, intake.FetchAsked(0, "d1", START, ((5, 9),), size=10))
    assert effects == ()


def status(boot: str = "1" * 16, connection: int = 1, state: str = "online", **changes: Any) -> wire.Status:
    return make_status({"boot": boot, "connection": connection, "state": state, "outbox_id": OUTBOX, **changes})


def seen(state: Intake, item: wire.Status, device: str = "d1") -> Any:
    return intake.step(state, intake.StatusSeen(7, device, item))


def test_every_birth_is_answered_with_a_sync_that_echoes_it() -> None:
    state, effects = seen(opened(), status())
    assert intake.SendCommand("d1", "sync", "1" * 16, 1) in effects
    assert intake.Tell(rounds.DeviceSeen(7, "d1")) in effects
    state, effects = seen(state, status())
    assert not [effect for effect in effects if isinstance(effect, intake.SendCommand)]
    _, effects = seen(state, status(connection=2))
    assert intake.SendCommand("d1", "sync", "1" * 16, 2) in effects


def test_a_greeting_that_may_have_been_lost_is_said_again() -> None:
    state, _ = seen(opened(), status())
    _, effects = intake.step(state, intake.LinkRestored(9))
    assert [(e.command, e.connection) for e in effects if isinstance(e, intake.SendCommand)] == [("sync", 1)]
    state, _ = seen(state, status(state="offline"))
    assert intake.step(state, intake.LinkRestored(9))[1] == ()


def test_a_late_will_of_an_earlier_connection_is_answered_with_rebirth() -> None:
    state, _ = seen(opened(), status(connection=2))
    state, effects = seen(state, status(connection=1, state="offline"))
    assert effects == (intake.SendCommand("d1", "rebirth", "1" * 16, 2),)
    state, effects = seen(state, status(connection=2, state="offline"))
    assert intake.Tell(rounds.DeviceLost(7, "d1")) in effects


def test_two_devices_with_one_id_raise_an_alarm() -> None:
    state, _ = seen(opened(), status())
    state, effects = seen(state, status(boot="2" * 16, outbox_id="2" * 16))
    assert "Alarm" in kinds(effects)
    # With a will in between the first sight is a plain restart; that it comes back tells.
    state, _ = seen(opened(), status())
    state, _ = seen(state, status(state="offline"))
    state, effects = seen(state, status(boot="2" * 16, outbox_id="2" * 16))
    assert "Alarm" not in kinds(effects)
    state, effects = seen(state, status(connection=2))
    assert "Alarm" in kinds(effects)


def test_a_restarted_device_raises_no_alarm() -> None:
    state, _ = seen(opened(), status())
    for boot in "23":
        state, effects = seen(state, status(boot=boot * 16))
        assert "Alarm" not in kinds(effects)


@dataclass
class Disk:
    """The durable effects, as the journal would keep them."""

    offers: dict[tuple[str, str], OpenUpload] = field(default_factory=dict)
    parts: dict[tuple[str, str], set[int]] = field(default_factory=dict)
    ledger: dict[tuple[str, int], str] = field(default_factory=dict)
    accepted: list[tuple[str, str]] = field(default_factory=list)

    def write(self, effect: intake.Effect) -> None:
        match effect:
            case intake.StoreOffer(upload):
                self.offers[upload.device, upload.upload] = upload
            case intake.StoreChunk(device, name, index):
                self.parts.setdefault((device, name), set()).add(index)
            case intake.DropParts(upload):
                self.parts.pop((upload.device, upload.upload), None)
                self.offers[upload.device, upload.upload] = upload
            case intake.DropOffer(device, name):
                self.offers.pop((device, name), None)
                self.parts.pop((device, name), None)
            case intake.Accept(upload):
                self.offers.pop((upload.device, upload.upload), None)
                self.ledger[upload.device, upload.seq] = upload.digest
                self.accepted.append((upload.device, upload.task))

    def restarted(self, now: int) -> intake.Restarted:
        stored = tuple((o, frozenset(self.parts.get(key, ()))) for key, o in sorted(self.offers.items()))
        return intake.Restarted(now, stored, ())


class World:
    """Devices with one entry each, a network that loses, repeats and reorders, and the machine with its disk."""

    def __init__(self, devices: int) -> None:
        self.names = [f"d{i}" for i in range(devices)]
        self.state, self.disk, self.now = opened(*self.names), Disk(), 0
        self.to_gateway: list[tuple[str, Any]] = []
        self.to_device: list[tuple[str, SendAck]] = []
        self.outbox = set(self.names)
        self.verifying: list[OpenUpload] = []

    def feed(self, event: intake.Event) -> None:
        self.state, effects = intake.step(self.state, event)
        for effect in effects:
            if isinstance(effect, intake.Durable):
                self.disk.write(effect)
        for effect in effects:
            if isinstance(effect, SendAck):
                self.to_device.append((effect.device, effect))
            elif isinstance(effect, intake.Verify):
                self.verifying.append(effect.upload)

    def offer(self, device: str) -> None:
        if device in self.outbox:
            self.to_gateway.append((device, offer(device)))

    def deliver(self, at: int, *, keep: bool) -> None:
        device, message = self.to_gateway[at] if keep else self.to_gateway.pop(at)
        if isinstance(message, int):
            self.feed(intake.ChunkArrived(self.now, device, offer(device).upload, message, 2 if message == 4 else 4))
            return
        known = self.disk.ledger.get((device, message.seq))
        self.feed(
            intake.Offered(
                self.now, device, message, True, recorded=known, answered=(device, message.task) in self.disk.accepted
            )
        )

    def hear(self, at: int) -> None:
        device, ack = self.to_device.pop(at)
        if ack.status == "need" and device in self.outbox:
            self.to_gateway += [(device, index) for index in ack.need]
        elif ack.status == "accepted":
            assert (device, 1) in self.disk.ledger  # an entry is deleted only for a ledger row
            self.outbox.discard(device)
        elif ack.status == "rejected":
            raise AssertionError(f"an honest device was refused: {ack}")

    def verify(self, good: bool) -> None:
        upload = self.verifying.pop(0)
        if good or upload.failures:
            self.feed(intake.Verified(self.now, upload.device, upload.upload))
        else:
            self.feed(intake.VerifyFailed(self.now, upload.device, upload.upload, "digest", again=True))

    def crash(self) -> None:
        self.verifying = []
        self.state = opened(*self.names)
        self.feed(self.disk.restarted(self.now))


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["offer", "deliver", "repeat", "lose", "hear", "deaf", "verify", "spoil", "crash", "tick"]),
        st.integers(0, 20),
    ),
    max_size=80,
)


@hypothesis_settings(max_examples=200, deadline=None)
@given(_STEPS, st.integers(1, 4))
def test_whatever_the_network_does_each_entry_is_accepted_once_and_then_forgotten(
    script: list[tuple[str, int]], devices: int
) -> None:
    world = World(devices)
    for action, number in script:
        world.now += 200
        at = number % len(world.to_gateway) if world.to_gateway else None
        heard = number % len(world.to_device) if world.to_device else None
        match action:
            case "offer":
                world.offer(world.names[number % devices])
            case "deliver" | "repeat" if at is not None:
                world.deliver(at, keep=action == "repeat")
            case "lose" if at is not None:
                world.to_gateway.pop(at)
            case "hear" if heard is not None:
                world.hear(heard)
            case "deaf" if heard is not None:
                world.to_device.pop(heard)
            case "verify" | "spoil" if world.verifying:
                world.verify(good=action == "verify")
            case "crash":
                world.crash()
            case "tick":
                world.feed(intake.Ticked(world.now))
        assert len(world.state.uploads) <= LIMITS.open_uploads
        assert len(set(world.disk.accepted)) == len(world.disk.accepted)
    for _ in range(60):  # from now on everything arrives
        world.now += 61_000
        world.feed(intake.Ticked(world.now))
        for device in sorted(world.outbox):
            world.offer(device)
        while world.to_gateway or world.to_device or world.verifying:
            while world.to_gateway:
                world.deliver(0, keep=False)
            while world.verifying:
                world.verify(good=True)
            while world.to_device:
                world.hear(0)
        if not world.outbox:
            break
    assert not world.outbox
    assert sorted(world.disk.accepted) == sorted((device, task_of(device)) for device in world.names)
