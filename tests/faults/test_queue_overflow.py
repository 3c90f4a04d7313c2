"""A broker that says "I have it" and throws it away."""

from __future__ import annotations

import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from aggregator.broker import answers, find_mosquitto
from edge_sdk import EdgeDevice
from edge_sdk.link import Link, LinkEvent, LinkUp, Message
from tests.faults.audit import audit
from tests.faults.plant import GATEWAY, Plant, chunked_site
from tests.system.site import end, free_port, until

QUEUED = 3


@pytest.mark.faults
def test_offers_that_were_acknowledged_and_dropped_are_made_again(tmp_path: Path) -> None:
    """The gateway is down while six devices offer to a session that may hold three messages."""
    port = free_port()
    (tmp_path / "small.conf").write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\nmax_queued_messages {QUEUED}\n"
    )
    found = find_mosquitto()
    assert found is not None
    site = chunked_site(tmp_path, list("abcdef"), chunks=2, rounds=1, broker=f"mqtt://127.0.0.1:{port}")
    heard: list[LinkEvent] = []
    with ExitStack() as stack:
        broker = subprocess.Popen([found[0], "-c", tmp_path / "small.conf"], stderr=subprocess.DEVNULL)
        stack.callback(end, broker)
        until(lambda: answers(site.broker))
        plant = stack.enter_context(Plant(site))
        plant.start(GATEWAY)
        devices = [stack.enter_context(EdgeDevice.open(site.config(name))) for name in site.ids]
        for device in devices:
            device.start()
            device.pause()
        until(lambda: site.status().assigned == len(devices))
        until(lambda: all(device.status().task for device in devices))
        plant.kill(GATEWAY)
        # A second session shows what the broker does with what waits for somebody who is not there.
        witness = Link(site.broker, "witness", on_event=heard.append)
        stack.callback(witness.close)
        witness.connect()
        until(lambda: heard)
        witness.subscribe(["edgewise/v1/test/tiny/dev/+/up/offer"])
        time.sleep(0.3)
        witness.disconnect()
        for device in devices:
            device.start()
        until(lambda: all(device.status().outbox_entries == 1 for device in devices))
        until(lambda: all(device._link.pending == 0 for device in devices))  # PUBACK, success
        witness.connect()
        until(lambda: sum(isinstance(event, LinkUp) for event in heard) == 2)
        time.sleep(0.5)
        assert 0 < sum(isinstance(event, Message) for event in heard) < len(devices)
        plant.start(GATEWAY)
        assert plant.died(GATEWAY, 60) == 0, plant.log(GATEWAY)
        until(lambda: not any(device.status().outbox_entries for device in devices))
    books = audit(site, allowed=frozenset())
    assert books.made == books.merged == 3 * len(devices)
