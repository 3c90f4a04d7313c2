"""A day without a link, by a clock that is passed in: the machine of the conversation around a real outbox."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_sdk import conversation as talk
from edge_sdk import wire
from edge_sdk.outbox import Draft, Outbox

DAY = 86_400.0
CAP = 4
COMMON: dict[str, Any] = {"id": "0" * 16, "boot": "0" * 16, "at": 0}


class Device:
    """The shell of a device, with time as a number: it trains whatever it is allowed to."""

    def __init__(self, folder: Path) -> None:
        self.outbox = Outbox(folder / "outbox.sqlite", max_entries=CAP)
        self.state = talk.Conversation("b" * 16, seed=7)
        self.now = 0.0
        self.timers: dict[str, float] = {}
        self.connects: list[float] = []
        self.offered: list[str] = []
        self.started: list[str] = []
        self.feed(talk.Started(0.0, ()))

    def feed(self, event: talk.Event) -> None:
        self.state, effects = talk.step(self.state, event)
        for effect in effects:
            match effect:
                case talk.Connect():
                    self.connects.append(self.now)
                case talk.SetTimer(name, delay):
                    self.timers[name] = self.now + delay
                case talk.CancelTimer(name):
                    self.timers.pop(name, None)
                case talk.PublishOffer(upload):
                    self.offered.append(upload)
                case talk.DeleteEntry(upload, fate):
                    self.outbox.delete(upload, fate)
                case talk.StartTask(task):
                    self.started.append(task.task)
                    self.train(task)

    def train(self, task: wire.Task) -> None:
        if not self.outbox.has_room(100):
            self.feed(talk.Gate(self.now, wire.Paused.DISK))
            self.feed(talk.TaskPostponed(self.now, task.task))
            return

        def sign(_draft: Draft) -> bytes:
            return b"offer"

        self.outbox.commit(task=task.task, number=1, program="p", body=task.task.encode(), feedback={}, sign=sign)
        self.feed(talk.TaskDone(self.now, task.task))
        heads = tuple(talk.Head(entry.upload, entry.digest, entry.chunks) for entry in self.outbox.entries())
        self.feed(talk.OutboxChanged(self.now, heads))

    def wait(self, seconds: float) -> None:
        """Let time pass; nobody answers any attempt to connect."""
        until = self.now + seconds
        while self.timers and min(self.timers.values()) <= until:
            name = min(self.timers, key=lambda timer: self.timers[timer])
            self.now = self.timers.pop(name)
            self.feed(talk.TimerFired(self.now, name))
            if self.state.link is talk.LinkState.CONNECTING:
                self.feed(talk.LinkDown(self.now, "nobody answers"))
        self.now = until

    def task(self, number: int) -> None:
        task = wire.Task(
            **COMMON,
            task=f"{number:016x}",
            round=number,
            program="p",
            start="5" * 64,
            start_bytes=1,
            base="b" * 64,
            deadline=int((self.now + 2 * DAY) * 1000),
            now=int(self.now * 1000),
            steps=1,
            epochs=0,
            batch_size=1,
            learning_rate=0.1,
            hyper={},
            seed=0,
            encoding={},
        )
        self.feed(talk.TaskOffered(self.now, task, None, None))

    def up(self) -> None:
        if self.state.link is talk.LinkState.OFFLINE:
            self.now = self.timers.pop("connect")
            self.feed(talk.TimerFired(self.now, "connect"))
        self.feed(talk.LinkUp(self.now, True, 20))
        args = {"boot": self.state.boot, "connection": self.state.connection}
        counter = self.state.counter + 1
        told = {"command": wire.Order.SYNC, "args": args, "counter": counter, "now": int(self.now * 1000)}
        self.feed(talk.CommandReceived(self.now, wire.Command(**COMMON, **told)))

    def answer(self) -> None:
        ack = {"status": wire.Verdict.ACCEPTED, "now": int(self.now * 1000)}
        self.feed(talk.AckReceived(self.now, wire.Ack(**COMMON, upload=self.offered[-1], **ack)))


def test_a_day_without_link(tmp_path: Path) -> None:
    device = Device(tmp_path)
    device.up()
    for number in range(CAP):  # the gateway gives tasks and hears no answer
        device.task(number)
    assert device.outbox.summary().entries == CAP
    device.feed(talk.LinkDown(device.now, "cut"))
    device.task(CAP)  # the retained one that it got last: trained without a link, if there were room
    device.wait(DAY)
    assert device.started == [f"{number:016x}" for number in range(CAP + 1)]
    summary = device.outbox.summary()
    assert (summary.entries, summary.made, summary.dropped) == (CAP, CAP, 0)  # the cap holds, and nothing was dropped
    assert (device.state.work, device.state.paused) == (talk.Work.READY, wire.Paused.DISK)
    gaps = [later - earlier for earlier, later in zip(device.connects, device.connects[1:], strict=False)]
    assert max(gaps) <= 60.0
    assert DAY / 60 < len(gaps) < DAY / 20  # every half minute in the mean
    waiting = [entry.upload for entry in device.outbox.entries()]
    device.up()
    first = len(device.offered) - 1
    for _ in waiting:
        device.answer()
    assert device.offered[first:] == waiting  # oldest first, each once
    assert device.outbox.summary().entries == 0
    device.feed(talk.Gate(device.now, wire.Paused.NONE))  # there is room again
    assert device.outbox.summary().made == CAP + 1


@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_devices_that_lose_their_link_at_once_do_not_come_back_at_once(seed: int) -> None:
    """The jitter alone, as numbers: no second of the first five sees more than twice its share."""
    delays = []
    for number in range(1000):
        state = talk.Conversation(f"{number:016x}", seed=1000 * seed + number)
        for event in (talk.Started(0.0, ()), talk.LinkUp(0.0, False, 20)):
            state, _ = talk.step(state, event)
        state, effects = talk.step(state, talk.LinkDown(600.0, "the broker is gone"))
        delays += [effect.delay for effect in effects if isinstance(effect, talk.SetTimer) and effect.name == "connect"]
    assert len(delays) == 1000
    per_second = [sum(second <= delay < second + 1 for delay in delays) for second in range(5)]
    assert sum(per_second) == 1000
    assert max(per_second) < 2 * 200
