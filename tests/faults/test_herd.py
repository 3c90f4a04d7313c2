"""A thousand devices lose their broker at one moment, with updates on their hands, and come back."""

from __future__ import annotations

import heapq
import itertools
import os
import queue
import re
import resource
import secrets
import signal
import sqlite3
import threading
import time
from collections import Counter
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pytest

from aggregator.broker import Broker
from aggregator.job import BrokerSettings
from devices.registry import Entry, Registry
from edge_sdk import conversation as talk
from edge_sdk import wire
from edge_sdk.errors import LinkError
from edge_sdk.keys import SigningKey, VerifyKey
from edge_sdk.link import Link, LinkDown, LinkEvent, LinkUp, Message, Sent, Will
from edge_sdk.tensors import digest, pack
from tests.system.site import Site, end, free_port, until
from tests.tiny_bundle import HEAD

ADDRESS = wire.Address("", "test", "tiny")


class Herd:
    """Devices with the real machine and the real connection, whose training is a constant; one thread serves them all."""

    def __init__(self, url: str, keys: dict[str, SigningKey], control: VerifyKey) -> None:
        self.control = control
        self.events: queue.Queue[tuple[Member, talk.Event | LinkEvent]] = queue.Queue()
        self.timers: list[tuple[float, int, Member, str]] = []
        self.numbers = itertools.count()
        self.ups: list[float] = []
        self.members = [Member(self, name, key, url) for name, key in keys.items()]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        for member in self.members:
            self.events.put((member, talk.Started(time.monotonic(), ())))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(10)
        for member in self.members:
            member.link.close()

    def _run(self) -> None:
        while not self._over.is_set():
            now = time.monotonic()
            while self.timers and self.timers[0][0] <= now:
                _, number, member, name = heapq.heappop(self.timers)
                if member.timers.get(name) == number:
                    del member.timers[name]
                    member.advance(talk.TimerFired(now, name))
            try:
                member, event = self.events.get(timeout=0.02)
            except queue.Empty:
                continue
            member.handle(event)

    @property
    def online(self) -> int:
        return sum(member.state.link is talk.LinkState.ONLINE for member in self.members)

    @property
    def waiting(self) -> int:
        return sum(len(member.outbox) for member in self.members)


class Member:
    """One of them; its outbox is in memory, for nobody kills it."""

    def __init__(self, herd: Herd, name: str, key: SigningKey, url: str) -> None:
        self.herd, self.name, self.key = herd, name, key
        self.outbox_id = secrets.token_hex(8)
        self.outbox: dict[str, tuple[bytes, bytes]] = {}  # upload -> offer, body
        self.made = 0
        self.timers: dict[str, int] = {}
        self.sent: dict[int, tuple[str, int]] = {}
        self.state = talk.Conversation(boot=secrets.token_hex(8), seed=secrets.randbits(53))
        self.link = Link(url, name, on_event=lambda event: herd.events.put((self, event)))

    def common(self) -> dict[str, Any]:
        return {"id": "0" * 16, "boot": self.state.boot, "at": 0}

    def handle(self, event: talk.Event | LinkEvent) -> None:
        now = time.monotonic()
        match event:
            case LinkUp():
                self.herd.ups.append(now)
                self.advance(talk.LinkUp(now, event.session_present, event.receive_max))
            case LinkDown():
                self.sent.clear()
                self.advance(talk.LinkDown(now, event.reason))
            case Sent():
                if (chunk := self.sent.pop(event.mid, None)) is not None:
                    self.advance(talk.ChunkSent(now, *chunk))
            case Message():
                self.hear(event, now)
            case _:
                self.advance(event)

    def hear(self, message: Message, now: float) -> None:
        parsed = ADDRESS.parse(message.topic)
        assert parsed is not None
        if parsed.kind == "ack":
            self.advance(talk.AckReceived(now, self.decode(wire.Ack, message)))
        elif parsed.kind == "command" and not message.retain:
            self.advance(talk.CommandReceived(now, self.decode(wire.Command, message)))
        elif parsed.kind == "task" and message.payload and not self.made:
            self.advance(talk.TaskOffered(now, self.decode(wire.Task, message), None, None))

    def decode(self, kind: Any, message: Message) -> Any:
        return wire.decode(kind, message.payload, address=ADDRESS, device=self.name, key=self.herd.control)

    def advance(self, event: talk.Event) -> None:
        self.state, effects = talk.step(self.state, event)
        for effect in effects:
            with suppress(LinkError):  # its timer repairs it
                self.perform(effect)

    def perform(self, effect: talk.Effect) -> None:
        match effect:
            case talk.Connect():
                self.link.connect(Will(ADDRESS.status(self.name), self.status(wire.State.OFFLINE)))
            case talk.Subscribe():
                self.link.subscribe(ADDRESS.device_subscriptions(self.name))
            case talk.PublishStatus(state):
                self.link.publish(ADDRESS.status(self.name), self.status(state), retain=True)
            case talk.PublishOffer(upload):
                self.link.publish(ADDRESS.offer(self.name), self.outbox[upload][0])
            case talk.SendChunk(upload, index, to):
                mid = self.link.publish(ADDRESS.chunk(self.name, to, upload, index), self.outbox[upload][1])
                self.sent[mid] = (upload, index)
            case talk.DeleteEntry(upload):
                del self.outbox[upload]
            case talk.SetTimer(name, delay):
                self.timers[name] = number = next(self.herd.numbers)
                heapq.heappush(self.herd.timers, (time.monotonic() + delay, number, self, name))
            case talk.CancelTimer(name):
                self.timers.pop(name, None)
            case talk.StartTask(task):
                self.train(task)

    def status(self, state: wire.State) -> bytes:
        message = wire.Status(
            **self.common(), state=state, connection=self.state.connection, outbox_id=self.outbox_id, bundle="0" * 64
        )
        return wire.encode(message, None, ADDRESS, self.name)

    def train(self, task: wire.Task) -> None:
        self.made += 1
        deltas = {"weight": np.full((3, 4), 0.01, np.float32), "bias": np.zeros(3, np.float32)}
        about = {"edgewise": "update/1", "program": HEAD, "start": task.start, "encoding": "float32"}
        body = pack(deltas, about)
        name = digest(body)
        upload = wire.upload_name(self.outbox_id, self.made, name)
        offer = wire.Offer(
            **self.common(),
            upload=upload,
            outbox_id=self.outbox_id,
            task=task.task,
            seq=self.made,
            round=task.round,
            size=len(body),
            num_examples=10,
            base=task.base,
            digest=name,
            chunk=wire.CHUNK,
            chunks=1,
            metrics={},
        )
        self.outbox[upload] = (wire.encode(offer, self.key, ADDRESS, self.name), body)
        self.herd.events.put((self, talk.TaskDone(time.monotonic(), task.task)))
        self.herd.events.put((self, talk.OutboxChanged(time.monotonic(), (talk.Head(upload, name, 1),))))


@pytest.mark.faults
@pytest.mark.parametrize("count", [pytest.param(1000, marks=pytest.mark.soak)])
def test_thousand_devices_return_at_once(tmp_path: Path, count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 16 * count)), hard))
    port = free_port()
    broker = Broker(tmp_path / "broker", BrokerSettings(url=None, port=port), kind="mosquitto")
    with ExitStack() as stack:
        stack.callback(broker.stop)
        broker.start()
        job = {"rounds": 1, "gate.enabled": False, "round.devices_wait": count, "round.deadline_seconds": 1800}
        site = Site(tmp_path, [], broker=broker.url, job=job)
        registry = Registry()
        keys = {}
        for number in range(count):
            name = f"press-{number:04d}"
            keys[name] = SigningKey.generate(tmp_path / f"{name}.key")
            registry.add(Entry(name, keys[name].verify_key.text))
        registry.save(site.registry)
        gateway = site.gateway_process()
        stack.callback(end, gateway)
        herd = stack.enter_context(Herd(site.broker, keys, VerifyKey.load(site.keys["control_public"])))
        until(lambda: herd.online == count, 120)
        until(lambda: accepted(tmp_path) > count // 20, 120)
        assert broker.pid is not None
        del herd.ups[:]
        died = time.monotonic()
        os.kill(broker.pid, signal.SIGKILL)
        until(lambda: len(herd.ups) >= count and herd.online == count, 120)
        took = max(herd.ups) - died
        per_second = Counter(int(moment - died) for moment in herd.ups)
        until(lambda: herd.waiting == 0 and accepted(tmp_path) == count, 900)
        peak = int(re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{gateway.pid}/status").read_text())[0]) // 1024
        assert gateway.wait(60) == 0
    print(
        f"{count} devices: all online again {took:.1f} s after the kill, at most {max(per_second.values())} connects a"
    )
    print(f"second; gateway's peak memory {peak} MiB; {time.monotonic() - died:.1f} s until the last update was merged")
    status = site.status()
    assert (status.merged, status.duplicated, status.refused) == (count, 0, {})
    assert took < 60
    assert peak < 512


def accepted(folder: Path) -> int:
    path = folder / "state" / "journal.sqlite"
    with (
        suppress(sqlite3.OperationalError),
        closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=10)) as db,
    ):
        return int(db.execute("SELECT count(*) FROM ledger").fetchone()[0])
    return 0  # the gateway is just making it
