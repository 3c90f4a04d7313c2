"""Both machines of the protocol joined by a network that loses, repeats and reorders, under crashes of either side.

For any such history (transport.md, section 8.2): (i) every entry of an outbox is in the ledger at most once; (ii) once
messages arrive, every entry ends; (iii) an entry is deleted only for a row of the ledger or a signed refusal; (iv) what
either side holds is bounded by its limits.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator import intake, rounds
from edge_sdk import conversation as talk
from edge_sdk import wire

NONCE, BASE, START = "n", "b" * 64, "5" * 64
LIMITS = intake.Limits(chunk=4, need=3, open_uploads=2, part_bytes=40, update_bytes=64, offers_per_minute=4)
SIZE, CHUNKS = 18, 5  # the last chunk has two bytes
ROUND_SECONDS = 300
COMMON: dict[str, Any] = {"id": "0" * 16, "boot": "0" * 16, "at": 0}


@dataclass
class Disk:
    """What survives a crash of the gateway: the durable effects, as the journal keeps them."""

    offers: dict[tuple[str, str], intake.OpenUpload] = field(default_factory=dict)
    parts: dict[tuple[str, str], set[int]] = field(default_factory=dict)
    ledger: dict[tuple[str, int], str] = field(default_factory=dict)  # (device, seq) -> digest
    answered: set[tuple[str, str]] = field(default_factory=set)  # (device, task)
    presence: dict[str, intake.Presence] = field(default_factory=dict)
    counter: int = 0

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
                assert (upload.device, upload.seq) not in self.ledger, "accepted twice"
                assert (upload.device, upload.task) not in self.answered, "a task answered twice"
                assert self.parts.pop((upload.device, upload.upload)) == set(range(CHUNKS))
                self.offers.pop((upload.device, upload.upload))
                self.ledger[upload.device, upload.seq] = upload.digest
                self.answered.add((upload.device, upload.task))
            case intake.SavePresence(presence):
                self.presence[presence.device] = presence


@dataclass
class Device:
    """A device: its machine, the timers of its shell, and what survives its crash (outbox, tasks done, command counter)."""

    name: str
    outbox_id: str
    boots: int = 0
    outbox: dict[int, wire.Offer] = field(default_factory=dict)
    made: int = 0
    done: set[str] = field(default_factory=set)
    counter: int = 0
    state: talk.Conversation = field(default_factory=lambda: talk.Conversation("", 0))
    timers: dict[str, float] = field(default_factory=dict)
    training: wire.Task | None = None
    unconfirmed: list[tuple[str, int]] = field(default_factory=list)  # chunks without a PUBACK

    @property
    def queue(self) -> tuple[talk.Head, ...]:
        return tuple(talk.Head(offer.upload, offer.digest, offer.chunks) for _, offer in sorted(self.outbox.items()))


class World:
    """Devices, the network between, the gateway. Every method is one thing that may happen."""

    def __init__(self, devices: int) -> None:
        self.now = 1000.0
        self.round = 0
        self.disk = Disk()
        self.devices = [Device(f"d{i}", f"{i:016x}") for i in range(devices)]
        self.to_gateway: list[tuple[str, Any]] = []
        self.to_device: list[tuple[str, Any]] = []
        self.verifying: list[intake.OpenUpload] = []
        self.refused: set[tuple[str, str]] = set()
        self.retained: dict[str, wire.Task | None] = {}
        self.gateway = intake.initial(LIMITS, NONCE)
        self.next_round()
        for device in self.devices:
            self.start(device)

    # The gateway's shell.

    @property
    def ms(self) -> int:
        return int(self.now * 1000)

    def feed_gateway(self, event: intake.Event) -> None:
        self.gateway, effects = intake.step(self.gateway, event)
        for effect in effects:
            if isinstance(effect, intake.Durable):
                self.disk.write(effect)
        for effect in effects:
            match effect:
                case intake.Verify(upload):
                    self.verifying.append(upload)
                case intake.SendAck():
                    self.send_ack(effect)
                case intake.SendCommand(device, command, boot, connection):
                    self.disk.counter += 1
                    args = {"boot": boot, "connection": connection}
                    order = wire.Order(command)
                    told = wire.Command(**COMMON, command=order, args=args, counter=self.disk.counter, now=self.ms)
                    self.to_device.append((device, told))

    def send_ack(self, effect: intake.SendAck) -> None:
        if effect.status == "rejected":
            self.refused.add((effect.device, effect.upload))
        ack = wire.Ack(
            **COMMON,
            upload=effect.upload,
            status=wire.Verdict(effect.status),
            need=effect.need,
            retry_after_ms=effect.retry_after_ms,
            reason=None if effect.reason is None else wire.Reason(effect.reason),
            detail=effect.detail[:64],
            now=self.ms,
        )
        self.to_device.append((effect.device, ack))

    def next_round(self) -> None:
        """The phase closes, and a new one opens with a task for everybody."""
        self.round += 1
        self.feed_gateway(intake.PhaseClosed(self.ms))
        self.deadline = self.ms + ROUND_SECONDS * 1000
        for device in self.devices:
            self.retained[device.name] = self.task_of(device.name)
            self.to_device.append((device.name, self.retained[device.name]))
        self.issue()

    def task_of(self, device: str) -> wire.Task:
        task = rounds.task_id(
            rounds.Settings(rounds=9, nonce=NONCE), self.round, rounds.Phase.TRAIN, 1000 * self.round, device
        )
        return wire.Task(
            **COMMON,
            task=task,
            round=self.round,
            program="p",
            start=START,
            start_bytes=1,
            base=BASE,
            deadline=self.deadline,
            now=self.ms,
            steps=1,
            epochs=0,
            batch_size=1,
            learning_rate=0.1,
            hyper={},
            seed=0,
            encoding={},
        )

    def issue(self) -> None:
        issued = {
            name: intake.IssuedTask(task.task, self.round, "train", START, BASE, 64, self.deadline)
            for name, task in self.retained.items()
            if task is not None
        }
        self.feed_gateway(intake.TasksIssued(self.ms, issued))

    def crash_gateway(self) -> None:
        self.verifying = []
        self.gateway = intake.initial(LIMITS, NONCE)
        stored = tuple((o, frozenset(self.disk.parts.get(key, ()))) for key, o in sorted(self.disk.offers.items()))
        self.feed_gateway(intake.Restarted(self.ms, stored, tuple(self.disk.presence.values())))
        self.issue()

    def verify(self, *, good: bool) -> None:
        upload = self.verifying.pop(0)
        if (upload.device, upload.upload) not in self.gateway.uploads:
            return
        if good:
            self.feed_gateway(intake.Verified(self.ms, upload.device, upload.upload))
        else:
            self.feed_gateway(intake.VerifyFailed(self.ms, upload.device, upload.upload, "digest", again=True))

    def deliver_up(self, at: int, *, keep: bool) -> None:
        name, message = self.to_gateway[at] if keep else self.to_gateway.pop(at)
        match message:
            case wire.Offer():
                known = self.disk.ledger.get((name, message.seq))
                answered = (name, message.task) in self.disk.answered
                self.feed_gateway(intake.Offered(self.ms, name, message, True, recorded=known, answered=answered))
            case wire.Status():
                self.feed_gateway(intake.StatusSeen(self.ms, name, message))
            case (upload, index):
                size = SIZE - index * 4 if index == CHUNKS - 1 else 4
                self.feed_gateway(intake.ChunkArrived(self.ms, name, upload, index, size))

    # The devices' shell.

    def feed(self, device: Device, event: talk.Event) -> None:
        device.state, effects = talk.step(device.state, event)
        for effect in effects:
            self.carry_out(device, effect)

    def carry_out(self, device: Device, effect: talk.Effect) -> None:
        online = device.state.link is talk.LinkState.ONLINE
        match effect:
            case talk.PublishOffer(upload) if online:
                found = [offer for offer in device.outbox.values() if offer.upload == upload]
                self.to_gateway += [(device.name, offer) for offer in found]
            case talk.SendChunk(upload, index) if online:
                self.to_gateway.append((device.name, (upload, index)))
                device.unconfirmed.append((upload, index))
            case talk.PublishStatus(state, _) if online:
                self.to_gateway.append((device.name, self.status(device, state)))
            case talk.Subscribe() if (task := self.retained.get(device.name)) is not None:
                self.to_device.append((device.name, task))
            case talk.DeleteEntry(upload, fate):
                self.forget(device, upload, accepted=fate == "accepted")
            case talk.Quarantine(upload):
                self.forget(device, upload, accepted=False)
            case talk.StartTask(task):
                device.training = task
            case talk.CancelTask():
                device.training = None
            case talk.SaveCounter(counter):
                device.counter = counter
            case talk.SetTimer(name, delay):
                device.timers[name] = self.now + delay
            case talk.CancelTimer(name):
                device.timers.pop(name, None)

    def forget(self, device: Device, upload: str, *, accepted: bool) -> None:
        (seq,) = (seq for seq, offer in device.outbox.items() if offer.upload == upload)
        if accepted:
            assert self.disk.ledger[device.name, seq] == device.outbox[seq].digest, "deleted without a row"
        else:
            assert (device.name, upload) in self.refused, "deleted without a verdict"
        del device.outbox[seq]

    def status(self, device: Device, state: wire.State) -> wire.Status:
        return wire.Status(
            **{**COMMON, "boot": device.state.boot},
            state=state,
            connection=device.state.connection,
            outbox_id=device.outbox_id,
            bundle=BASE,
        )

    def start(self, device: Device) -> None:
        """The process begins, after a crash or for the first time."""
        device.boots += 1
        device.timers, device.training, device.unconfirmed = {}, None, []
        boot = f"{device.boots:08x}{device.outbox_id[:8]}"
        device.state = talk.Conversation(boot=boot, seed=device.boots, counter=device.counter)
        self.feed(device, talk.Started(self.now, device.queue))

    def link_up(self, device: Device, *, session: bool) -> None:
        if device.state.link is talk.LinkState.CONNECTING:
            self.feed(device, talk.LinkUp(self.now, session, 20))

    def cut(self, device: Device) -> None:
        if device.state.link in (talk.LinkState.ONLINE, talk.LinkState.CONNECTING):
            device.unconfirmed = []
            self.feed(device, talk.LinkDown(self.now, "cut"))

    def confirm(self, device: Device, at: int) -> None:
        if device.unconfirmed:
            chunk = device.unconfirmed.pop(at % len(device.unconfirmed))
            self.feed(device, talk.ChunkSent(self.now, *chunk))

    def train(self, device: Device) -> None:
        """The task that runs ends: update stored and task done, in one transaction."""
        task, device.training = device.training, None
        if task is None or task.task in device.done:
            return
        device.made += 1
        digest = f"{device.made:04x}{device.outbox_id[:12]}".ljust(64, "0")
        device.outbox[device.made] = wire.Offer(
            **COMMON,
            upload=wire.upload_name(device.outbox_id, device.made, digest),
            outbox_id=device.outbox_id,
            task=task.task,
            seq=device.made,
            round=task.round,
            size=SIZE,
            num_examples=1,
            base=BASE,
            digest=digest,
            chunk=4,
            chunks=CHUNKS,
            metrics={},
        )
        device.done.add(task.task)
        self.feed(device, talk.TaskDone(self.now, task.task))
        self.feed(device, talk.OutboxChanged(self.now, device.queue))

    def hear(self, at: int, *, keep: bool) -> None:
        name, message = self.to_device[at] if keep else self.to_device.pop(at)
        device = next(device for device in self.devices if device.name == name)
        if device.state.link is not talk.LinkState.ONLINE:
            return
        match message:
            case wire.Ack():
                self.feed(device, talk.AckReceived(self.now, message))
            case wire.Command():
                self.feed(device, talk.CommandReceived(self.now, message))
            case wire.Task() if message.task not in device.done:
                self.feed(device, talk.TaskOffered(self.now, message, None, None))

    def wait(self, seconds: float) -> None:
        self.now += seconds
        for device in self.devices:
            for name in [name for name, at in device.timers.items() if at <= self.now]:
                if device.timers.pop(name, None) is not None:
                    self.feed(device, talk.TimerFired(self.now, name))
        self.feed_gateway(intake.Ticked(self.ms))

    # What holds at any time, and in the end.

    def check_bounds(self) -> None:
        uploads = self.gateway.uploads.values()
        assert len(uploads) <= LIMITS.open_uploads
        assert sum(progress.info.size for progress in uploads) <= LIMITS.part_bytes
        assert all(len(times) <= LIMITS.offers_per_minute + 1 for times in self.gateway.offers.values())
        assert all(len(progress.bad) < intake.BAD_CHUNKS for progress in uploads)
        for device in self.devices:
            assert device.state.queue == device.queue
            upload = device.state.upload
            if upload is not None:
                assert len(upload.in_flight) <= device.state.window
                assert len(upload.need) <= LIMITS.need
                assert upload.head in device.queue

    def settle(self) -> None:
        """From now on everything arrives, in order."""
        for _ in range(400):
            for device in self.devices:
                self.link_up(device, session=True)
            while self.to_gateway or self.to_device or self.verifying or any(d.unconfirmed for d in self.devices):
                while self.to_gateway:
                    self.deliver_up(0, keep=False)
                while self.verifying:
                    self.verify(good=True)
                while self.to_device:
                    self.hear(0, keep=False)
                for device in self.devices:
                    while device.unconfirmed:
                        self.confirm(device, 0)
            self.check_bounds()
            if not any(device.outbox for device in self.devices):
                return
            self.wait(5.0)
        raise AssertionError(f"these entries never ended: {[device.queue for device in self.devices]}")


def happen(world: World, draw: random.Random) -> None:
    """One thing, by chance. Most messages arrive, or nothing would ever get far enough to be disturbed."""
    device = draw.choice(world.devices)
    up = draw.randrange(len(world.to_gateway)) if world.to_gateway else None
    down = draw.randrange(len(world.to_device)) if world.to_device else None
    things: list[tuple[int, Callable[[], object]]] = [
        (10, lambda: world.link_up(device, session=draw.random() < 0.7)),
        (12, lambda: world.train(device)),
        (12, lambda: world.confirm(device, draw.randrange(8))),
        (10, lambda: world.wait(draw.expovariate(0.5))),
        (2, lambda: world.wait(draw.uniform(0, 120))),
        (2, lambda: world.cut(device)),
        (1, lambda: world.start(device)),
        (1, world.crash_gateway),
        (1, world.next_round),
    ]
    if up is not None:
        things += [
            (20, lambda: world.deliver_up(0, keep=False)),
            (8, lambda: world.deliver_up(up, keep=False)),
            (4, lambda: world.deliver_up(up, keep=True)),
            (4, lambda: world.to_gateway.pop(up)),
        ]
    if down is not None:
        things += [
            (20, lambda: world.hear(0, keep=False)),
            (8, lambda: world.hear(down, keep=False)),
            (4, lambda: world.hear(down, keep=True)),
            (4, lambda: world.to_device.pop(down)),
        ]
    if world.verifying:
        things += [(20, lambda: world.verify(good=draw.random() < 0.7))]
    draw.choices([act for _, act in things], [weight for weight, _ in things])[0]()


@settings(max_examples=2000, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(50, 300), st.integers(1, 3))
def test_whatever_the_network_does_every_update_is_counted_once_and_ends(seed: int, length: int, devices: int) -> None:
    world, draw = World(devices), random.Random(seed)
    for _ in range(length):
        happen(world, draw)
        world.check_bounds()
    world.settle()
    for device in world.devices:
        counted = {seq for name, seq in world.disk.ledger if name == device.name}
        refused = {int(upload.split("-")[1]) for name, upload in world.refused if name == device.name}
        assert counted | refused >= set(range(1, device.made + 1))


def test_without_trouble_every_task_is_answered() -> None:
    """The joined machines do work: otherwise the property above would hold of a world where nothing happens."""
    world = World(3)
    for number in range(4):
        world.settle()
        for device in world.devices:
            world.train(device)
        world.settle()
        assert len(world.disk.ledger) == 3 * (number + 1)
        assert not world.refused
        world.next_round()
