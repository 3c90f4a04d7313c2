"""What a rogue broker or neighbour says to a device in the gateway's name (transport.md, section 12: S13, S14).

The device is a real one with a real outbox; the gateway is played by the test, which has its control key.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aggregator.broker import Broker
from aggregator.job import BrokerSettings
from edge_sdk import EdgeDevice, wire
from edge_sdk.bundle import Bundle
from edge_sdk.keys import SigningKey
from edge_sdk.link import Message
from edge_sdk.tensors import digest
from tests.system.site import Site, until
from tests.tiny_bundle import HEAD
from tests.transport.conftest import Peer

ADDRESS = wire.Address("", "test", "tiny")
HOUR = 3_600_000  # ms


class Gateway:
    """The gateway's side of one device's conversation, spoken by hand."""

    def __init__(self, site: Site, url: str) -> None:
        self.key = SigningKey.load(site.keys["control_key"])
        self.rogue = SigningKey.generate(site.folder / "rogue.key")
        self.peer = Peer(url, "gateway")
        self.peer.up()
        self.peer.link.subscribe(ADDRESS.aggregator_subscriptions())
        self.counter = 0
        with Bundle.open(site.bundle) as bundle:
            blob = bundle.start_blob(bundle.program(HEAD))
            self.base, self.start, self.size = bundle.base, digest(blob), len(blob)

    def common(self) -> dict[str, Any]:
        return {"id": secrets.token_hex(8), "boot": "0" * 16, "at": 0}

    def now(self) -> int:
        return time.time_ns() // 1_000_000

    def say(self, topic: str, message: wire.Message, device: str = "a", key: SigningKey | None = None) -> None:
        self.peer.link.publish(topic, wire.encode(message, key or self.key, ADDRESS, device))

    def hear(self, kind: str) -> Message:
        return self.peer.wait(Message, lambda event: f"/up/{kind}" in event.topic and event.payload)

    def command(self, order: wire.Order, *, counter: int | None = None, **args: str | int) -> wire.Command:
        self.counter += 1
        number = self.counter if counter is None else counter
        return wire.Command(**self.common(), command=order, args=args, counter=number, now=self.now())

    def greet(self) -> wire.Command:
        """Answer the device's birth with the time."""
        birth = wire.decode(wire.Status, self.hear("status").payload, address=ADDRESS, device="a")
        sync = self.command(wire.Order.SYNC, boot=birth.boot, connection=birth.connection)
        self.say(ADDRESS.command("a"), sync)
        return sync

    def task(self, **changes: Any) -> wire.Task:
        fields: dict[str, Any] = {
            "task": secrets.token_hex(8),
            "round": 1,
            "program": HEAD,
            "start": self.start,
            "start_bytes": self.size,
            "base": self.base,
            "deadline": self.now() + HOUR,
            "now": self.now(),
            "steps": 2,
            "epochs": 0,
            "batch_size": 4,
            "learning_rate": 0.1,
            "seed": 1,
            "encoding": {"kind": "float32", "feedback": "clear"},
        }
        return wire.Task(**self.common(), **{**fields, **changes})

    def offer(self) -> wire.Offer:
        return wire.decode(wire.Offer, self.hear("offer").payload, address=ADDRESS, device="a")

    def verdict(self, offer: wire.Offer, **changes: Any) -> wire.Ack:
        fields = {"upload": offer.upload, "status": wire.Verdict.ACCEPTED, "digest": offer.digest, "now": self.now()}
        return wire.Ack(**self.common(), **{**fields, **changes})


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[tuple[Gateway, EdgeDevice]]:
    broker = Broker(tmp_path / "broker", BrokerSettings(None, 0), kind="mosquitto")
    url = broker.start()
    site = Site(tmp_path, ["a"], broker=url)
    gateway = Gateway(site, url)
    with EdgeDevice.open(site.config("a")) as device:
        device.start()
        yield gateway, device
    gateway.peer.link.close()
    broker.stop()


def test_forged_verdict_is_ignored(scene: tuple[Gateway, EdgeDevice]) -> None:
    gateway, device = scene
    gateway.greet()
    gateway.say(ADDRESS.assign("a"), gateway.task())
    offer, topic = gateway.offer(), ADDRESS.ack("a")
    assert device.status().outbox_entries == 1
    good = gateway.verdict(offer)
    rejected = replace(good, status=wire.Verdict.REJECTED, reason=wire.Reason.ROUND_CLOSED)
    before = device.status().refused_messages
    for message in (good, rejected):
        gateway.say(topic, message, key=gateway.rogue)  # signed by somebody else
        gateway.say(topic, message, device="b")  # signed for another device
        text = wire.encode(message, gateway.key, ADDRESS, "a").partition(b"\n")[0]
        gateway.peer.link.publish(topic, text)  # not signed
        gateway.peer.link.publish(topic, text + b"\n" + b"A" * 88)
    until(lambda: device.status().refused_messages == before + 8)
    gateway.say(topic, gateway.verdict(offer, digest="0" * 64))  # true of other bytes
    gateway.say(topic, gateway.verdict(offer, upload=offer.upload[:-1] + ("0" if offer.upload[-1] != "0" else "1")))
    time.sleep(0.5)
    assert (device.status().outbox_entries, device.status().updates_accepted) == (1, 0)
    gateway.say(topic, good)
    until(lambda: device.status().updates_accepted == 1)
    assert device.status().outbox_entries == 0


def test_unsigned_orders_are_ignored(scene: tuple[Gateway, EdgeDevice]) -> None:
    gateway, device = scene
    gateway.greet()
    until(lambda: device.status().clock == "synced")
    manifest = wire.RoundManifest(
        **gateway.common(),
        round=9,
        base=gateway.base,
        model=None,
        model_bytes=0,
        opened=gateway.now(),
        deadline=gateway.now() + HOUR,
        now=gateway.now(),
        quorum=1,
        staleness=0,
    )
    before = device.status().refused_messages
    pause = gateway.command(wire.Order.PAUSE)
    for topic, message, who in (
        (ADDRESS.round_topic, manifest, "*"),
        (ADDRESS.assign("a"), gateway.task(), "a"),
        (ADDRESS.command("a"), pause, "a"),
    ):
        gateway.say(topic, message, device=who, key=gateway.rogue)
        gateway.peer.link.publish(topic, wire.encode(message, gateway.key, ADDRESS, who).partition(b"\n")[0])
    until(lambda: device.status().refused_messages == before + 6)
    assert (device.status().round, device.status().task, device.status().paused) == (0, None, "none")
    gateway.say(ADDRESS.command("a"), pause)
    until(lambda: device.status().paused == "user")
    assert device.status().round == 0


def test_an_old_order_is_not_obeyed_again_and_time_does_not_go_back(scene: tuple[Gateway, EdgeDevice]) -> None:
    gateway, device = scene
    gateway.greet()
    pause, resume = gateway.command(wire.Order.PAUSE), gateway.command(wire.Order.RESUME)
    gateway.say(ADDRESS.command("a"), pause)
    until(lambda: device.status().paused == "user")
    gateway.say(ADDRESS.command("a"), resume)
    until(lambda: device.status().paused == "none")
    known = device._state.gateway_now(time.monotonic())
    gateway.say(ADDRESS.command("a"), pause)  # captured, and sent once more
    gateway.say(ADDRESS.command("a"), gateway.command(wire.Order.FLUSH, counter=1))
    late = replace(gateway.command(wire.Order.RESUME), now=gateway.now() - 24 * HOUR)
    gateway.say(ADDRESS.command("a"), late)
    until(lambda: device._state.counter == late.counter)
    assert device.status().paused == "none"
    assert device._state.ignored["old_command"] == 2
    assert device._state.gateway_now(time.monotonic()) >= known
