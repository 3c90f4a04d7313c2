"""The gateway dies at each point of the crash table (transport.md, 6.3), and the books are exact all the same."""

from __future__ import annotations

import sqlite3
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from aggregator.broker import Broker
from aggregator.job import BrokerSettings
from edge_sdk import EdgeDevice
from edge_sdk.link import Link, LinkEvent, Message
from tests.faults.audit import audit
from tests.faults.plant import GATEWAY, Plant, chunked_site
from tests.system.site import free_port, until

# The third acceptance of a process is one whose verdict could already travel, were it sent before the commit.
POINTS = ["A1", "A2", "A3", "A4:2", "A5", "A6:3", "A7", "A8", "A9"]


@pytest.mark.faults
def test_each_point_of_the_table(tmp_path: Path) -> None:
    """One job whose gateway dies nine times, at a point further on each time. The broker lives on: it is not its child."""
    port = free_port()
    broker = Broker(tmp_path / "broker", BrokerSettings(url=None, port=port), kind="mosquitto")
    site = chunked_site(tmp_path, ["a", "b"], chunks=3, rounds=2, broker=f"mqtt://127.0.0.1:{port}")
    heard: list[LinkEvent] = []
    with ExitStack() as stack:
        stack.callback(broker.stop)
        broker.start()
        listener = Link(site.broker, "listener", on_event=heard.append)
        stack.callback(listener.close)
        listener.connect()
        until(lambda: heard)
        listener.subscribe(["edgewise/v1/test/tiny/cfg/#"])
        plant = stack.enter_context(Plant(site))
        for name in site.ids:
            stack.enter_context(EdgeDevice.open(site.config(name))).start()
        for point in POINTS:
            plant.start(GATEWAY, faults=point)
            assert plant.died(GATEWAY) == -9, f"{point}: {plant.log(GATEWAY)}"
        topic, payload = published_round(site.folder)
        del heard[:]
        plant.start(GATEWAY)
        until(
            lambda: (topic, payload) in [(event.topic, event.payload) for event in heard if isinstance(event, Message)]
        )
        assert plant.died(GATEWAY, 60) == 0, plant.log(GATEWAY)
    books = audit(site, allowed=frozenset())
    assert books.made == books.merged == 2 * 5
    assert books.models == 2


def published_round(folder: Path) -> tuple[str, bytes]:
    with closing(sqlite3.connect(folder / "state" / "journal.sqlite")) as db:
        return db.execute("SELECT topic, payload FROM published WHERE topic LIKE '%/cfg/round'").fetchone()
