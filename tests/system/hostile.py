"""A device that speaks the real protocol and means no good: it signs with its own key, and sends what it likes."""

from __future__ import annotations

import queue
import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

from edge_sdk import wire
from edge_sdk.keys import SigningKey, VerifyKey
from edge_sdk.link import Link, LinkEvent, LinkUp, Message
from edge_sdk.tensors import digest
from edge_sdk.wire import CHUNK
from tests.system.site import Site, until

COMMON: dict[str, Any] = {"id": "0" * 16, "boot": "0" * 16, "at": 0}


class HostileDevice:
    """One connection under a registered id. What it is told is kept in `task` and `acks`."""

    def __init__(self, site: Site, device: str, *, key: SigningKey | None = None) -> None:
        self.device = device
        self.address = wire.Address("", "test", "tiny")
        self.key = key or SigningKey.load(site.folder / device / "device.key")
        self.outbox_id, self.boot = secrets.token_hex(8), secrets.token_hex(8)
        self.task: wire.Task | None = None
        self.acks: list[wire.Ack] = []
        self._control = VerifyKey.load(site.keys["control_public"])
        self._events: queue.Queue[LinkEvent] = queue.Queue()
        self.link = Link(site.broker, device, on_event=self._events.put)

    def connect(self) -> None:
        """Connect, listen, and say that this device is here."""
        self.link.connect()
        self.hear(lambda event: isinstance(event, LinkUp))
        self.link.subscribe(self.address.device_subscriptions(self.device))
        self.greet()

    def greet(self) -> None:
        """Say that this device is here."""
        status = wire.Status(
            **{**COMMON, "boot": self.boot},
            state=wire.State.ONLINE,
            connection=1,
            outbox_id=self.outbox_id,
            bundle="0" * 64,
        )
        self.send(self.address.status(self.device), status, retain=True)

    def hear(self, wanted: Callable[[LinkEvent], Any], seconds: float = 20.0) -> Any:
        """Take in what comes until `wanted` says something true of an event; return that."""

        def listen() -> Any:
            with suppress(queue.Empty):
                while True:
                    event = self._events.get_nowait()
                    self._take(event)
                    if found := wanted(event):
                        return found
            return None

        return until(listen, seconds)

    def _take(self, event: LinkEvent) -> None:
        if not isinstance(event, Message) or not event.payload:
            return
        parsed = self.address.parse(event.topic)
        if parsed is not None and parsed.kind == "task":
            self.task = self._decode(wire.Task, event)
        elif parsed is not None and parsed.kind == "ack":
            self.acks.append(self._decode(wire.Ack, event))

    def _decode(self, kind: type[Any], event: Message) -> Any:
        return wire.decode(kind, event.payload, address=self.address, device=self.device, key=self._control)

    def wait_for_task(self) -> wire.Task:
        """The task that the gateway gives this device."""
        if self.task is None:
            self.hear(lambda _: self.task)
        assert self.task is not None
        return self.task

    def send(self, topic: str, message: wire.Message, *, retain: bool = False) -> None:
        """Publish a message, signed where its kind asks for it."""
        self.link.publish(topic, wire.encode(message, self.key, self.address, self.device), retain=retain)

    def offer(self, body: bytes, *, seq: int = 1, **changes: Any) -> wire.Offer:
        """An offer of `body` for this device's task; `changes` are the lies."""
        task = self.wait_for_task()
        name = changes.get("digest", digest(body))
        fields = {
            "upload": wire.upload_name(self.outbox_id, seq, name),
            "outbox_id": self.outbox_id,
            "task": task.task,
            "seq": seq,
            "round": task.round,
            "size": len(body),
            "num_examples": 10,
            "base": task.base,
            "digest": name,
            "chunk": CHUNK,
            "chunks": wire.chunk_count(changes.get("size", len(body))),
            "metrics": {},
            **changes,
        }
        return wire.Offer(**COMMON, **fields)

    def deliver(self, body: bytes, offer: wire.Offer) -> wire.Ack:
        """Offer, send what is asked for, and return the verdict."""
        self.send(self.address.offer(self.device), offer)

        def verdict(event: LinkEvent) -> wire.Ack | None:
            ack = self.acks[-1] if isinstance(event, Message) and self.acks else None
            if ack is None or ack.upload != offer.upload or "/down/ack" not in event.topic:
                return None
            if ack.final:
                return ack
            for index in ack.need:
                self.chunk(offer.upload, index, body[index * CHUNK : (index + 1) * CHUNK])
            return None

        return self.hear(verdict)

    def chunk(self, upload: str, index: int, data: bytes) -> None:
        """Send one chunk."""
        self.link.publish(self.address.chunk(self.device, "aggregator", upload, index), data)

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.link.close()
