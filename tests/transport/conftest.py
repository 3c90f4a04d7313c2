from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aggregator.broker import Broker
from aggregator.job import BrokerSettings
from edge_sdk.link import Link, LinkEvent, LinkUp, Message


class Peer:
    """A link whose events are collected."""

    def __init__(self, url: str, name: str, **options) -> None:
        self.name = name
        self.events: queue.Queue[LinkEvent] = queue.Queue()
        self.link = Link(url, name, on_event=self.events.put, **options)

    def up(self, **options) -> LinkUp:
        self.link.connect(**options)
        return self.wait(LinkUp)

    def wait(self, kind: type, accept: Callable = lambda event: True, seconds: float = 10.0):
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            try:
                event = self.events.get(timeout=left)
            except queue.Empty:
                break
            if isinstance(event, kind) and accept(event):
                return event
        raise AssertionError(f"no {kind.__name__} within {seconds} s")

    def listen(self, topic: str) -> None:
        """Subscribe, and go on when the broker has heard it: what a connection says is handled in order."""
        echo = f"edgewise-echo/{self.name}"
        self.link.subscribe([topic, echo])
        self.link.publish(echo, b"")
        self.link.ack(self.message(echo))

    def message(self, topic: str) -> Message:
        return self.wait(Message, lambda event: event.topic == topic)


@pytest.fixture
def peers() -> Iterator[Callable[..., Peer]]:
    made: list[Peer] = []

    def make(url: str, name: str, **options) -> Peer:
        made.append(Peer(url, name, **options))
        return made[-1]

    yield make
    for peer in made:
        peer.link.close()


@pytest.fixture
def broker(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Broker]:
    """A running broker: mosquitto, or what the test's parameter names."""
    started = Broker(tmp_path / "broker", BrokerSettings(url=None, port=0), kind=getattr(request, "param", "mosquitto"))
    started.start()
    yield started
    started.stop()
