"""What a broker or a device remembers of yesterday does not stand in the way of today."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from aggregator.broker import Broker
from aggregator.job import BrokerSettings
from edge_sdk import DeviceEvent, EdgeDevice, wire
from edge_sdk.keys import SigningKey
from edge_sdk.link import Link, LinkEvent, Sent
from tests.system.site import Site, free_port, until

DAY = 86_400_000


def test_a_new_journal_under_the_name_of_an_old_job_is_served_by_devices_that_never_stopped(tmp_path: Path) -> None:
    """The operator starts the job from scratch: round 1 follows round 2."""
    site = Site(tmp_path, ["a"], job={"rounds": 2, "gate.enabled": False})
    with ExitStack() as stack:
        device = stack.enter_context(EdgeDevice.open(site.config("a")))
        device.start()
        with site.service() as running:
            assert running.wait().merged == 2
        shutil.rmtree(tmp_path / "state")
        with site.service() as running:
            status = running.wait(40)
    assert (status.state, status.merged) == ("done", 2)


@pytest.mark.faults
def test_a_retained_round_and_task_of_yesterday_start_nothing(tmp_path: Path) -> None:
    """A broker gives back the last words of a gateway that is gone; they are signed, and out of date."""
    port = free_port()
    broker = Broker(tmp_path / "broker", BrokerSettings(url=None, port=port), kind="mosquitto")
    site = Site(tmp_path, ["a"], job={"rounds": 1}, broker=f"mqtt://127.0.0.1:{port}")
    events: list[DeviceEvent] = []
    with ExitStack() as stack:
        stack.callback(broker.stop)
        broker.start()
        yesterday(site)
        device = stack.enter_context(EdgeDevice.open(site.config("a"), on_event=events.append))
        device.start()
        until(lambda: device.status().round == 57)
        time.sleep(1.0)
        assert device.status().updates_made == 0
        with site.service() as running:
            assert running.wait(40).merged == 3
        assert device.status().updates_made == 3
    assert [event.detail for event in events if event.kind == "task_started"] == [
        "tiny/evaluate/head/float of round 0",
        "tiny/head/float of round 1",
        "tiny/evaluate/head/float of round 1",
    ]


def yesterday(site: Site) -> None:
    """Leave at the broker what a gateway said a day ago, taken from one that says it now."""
    heard: list[LinkEvent] = []
    address, key = wire.Address("", "test", "tiny"), SigningKey.load(site.keys["control_key"])
    link = Link(site.broker, "yesterday", on_event=heard.append)
    link.connect()
    until(lambda: heard)
    then = time.time_ns() // 1_000_000 - DAY
    common = {"id": "0" * 16, "boot": "0" * 16, "at": then}
    manifest = wire.RoundManifest(
        **common,
        round=57,
        base=base_of(site),
        model=None,
        model_bytes=0,
        opened=then,
        deadline=then + 60_000,
        now=then,
        quorum=1,
        staleness=0,
    )
    task = wire.Task(
        **common,
        task="7" * 16,
        round=57,
        program="tiny/head/float",
        start="0" * 64,
        start_bytes=1000,
        base=base_of(site),
        deadline=then + 60_000,
        now=then,
        steps=1,
        epochs=0,
        batch_size=1,
        learning_rate=0.1,
        hyper={},
        seed=0,
        encoding={"kind": "float32", "feedback": "keep"},
    )
    link.publish(address.round_topic, wire.encode(manifest, key, address), retain=True)
    link.publish(address.assign("a"), wire.encode(task, key, address, "a"), retain=True)
    until(lambda: sum(isinstance(event, Sent) for event in heard) == 2)
    link.close()


def base_of(site: Site) -> str:
    from edge_sdk.bundle import Bundle

    with Bundle.open(site.bundle) as bundle:
        return bundle.base
