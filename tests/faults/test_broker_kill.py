"""The broker dies and forgets; device and gateway do not."""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from edge_sdk import EdgeDevice
from edge_sdk.link import Link, LinkEvent, Message
from tests.faults.audit import audit
from tests.faults.plant import chunked_site
from tests.system.site import until


@pytest.mark.faults
@pytest.mark.parametrize("memory", ["lost", "stale"])
def test_sigkill_in_mid_upload_costs_no_update_and_the_retained_messages_come_back(tmp_path: Path, memory: str) -> None:
    """With the default autosave (60 s) the broker comes back without sessions, queues and retained messages, or with old ones."""
    site = chunked_site(tmp_path, ["a", "b"], chunks=7, rounds=2)
    heard: list[LinkEvent] = []
    with ExitStack() as stack:
        running = stack.enter_context(site.service())
        devices = [stack.enter_context(EdgeDevice.open(site.config(name))) for name in site.ids]
        for device in devices:
            device.start()
        database = tmp_path / "state" / "broker" / "mosquitto.db"
        until(lambda: site.status().phase == "evaluate")
        broker = running.service._broker
        assert broker.pid is not None
        if memory == "stale":
            os.kill(broker.pid, signal.SIGUSR1)  # it saves what it holds now: the tasks of round 0
            until(database.exists)
        until(lambda: site.status().round == 1 and any(device.status().outbox_entries for device in devices))
        os.kill(broker.pid, signal.SIGKILL)
        assert database.exists() == (memory == "stale")
        died = time.monotonic()
        until(lambda: site.status().round == 2 or site.status().state == "done", 30)
        assert time.monotonic() - died < 30
        late = stack.enter_context(ExitStack())
        listener = Link(site.broker, "late", on_event=heard.append)
        late.callback(listener.close)
        listener.connect()
        until(lambda: heard)
        listener.subscribe(["edgewise/v1/test/tiny/cfg/#"])
        until(
            lambda: {event.topic.rsplit("/", 1)[1] for event in heard if isinstance(event, Message)} == {"job", "round"}
        )
        assert running.wait().state == "done"
        until(lambda: all(device.status().outbox_entries == 0 for device in devices))
    assert audit(site, allowed=frozenset()).models == 2
