"""Who is there: a device's last word counts, not what the broker says later in its name."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from edge_sdk import EdgeDevice, wire
from edge_sdk.keys import VerifyKey
from edge_sdk.link import Link, LinkEvent, LinkUp, Message
from tests.system.hostile import COMMON
from tests.system.site import Site, until

ADDRESS = wire.Address("", "test", "tiny")


def test_late_will_of_an_old_boot_is_ignored(tmp_path: Path) -> None:
    """A will that was delayed is published after the device has come back; it is retained, and wrong."""
    site = Site(tmp_path, ["a"], samples=5, job={"rounds": 1, "round.devices_wait": 2})
    heard: list[LinkEvent] = []
    with ExitStack() as stack:
        stack.enter_context(site.service())
        until(lambda: site.status().broker)
        device = stack.enter_context(EdgeDevice.open(site.config("a")))
        device.start()
        until(lambda: [found.online for found in site.status().devices] == [True])
        broker = Link(site.broker, "the-broker", on_event=heard.append)
        stack.callback(broker.close)
        broker.connect()
        until(lambda: any(isinstance(event, LinkUp) for event in heard))
        broker.subscribe([ADDRESS.status("a"), ADDRESS.command("a")])
        until(lambda: statuses(heard))
        will = wire.Status(
            **{**COMMON, "boot": "0" * 16},
            state=wire.State.OFFLINE,
            connection=7,
            outbox_id=device._outbox.outbox_id,
            bundle="0" * 64,
        )
        broker.publish(ADDRESS.status("a"), wire.encode(will, None, ADDRESS, "a"), retain=True)
        until(lambda: [status.state for status in statuses(heard)][-2:] == ["offline", "online"])
        assert statuses(heard)[-1].boot == device._state.boot
        assert [found.online for found in site.status().devices] == [True]
        control = VerifyKey.load(site.keys["control_public"])
        commands = [
            wire.decode(wire.Command, event.payload, address=ADDRESS, device="a", key=control).command
            for event in heard
            if isinstance(event, Message) and event.topic == ADDRESS.command("a")
        ]
        assert commands == [wire.Order.REBIRTH]
        # What a late listener finds is right again.
        late: list[LinkEvent] = []
        listener = Link(site.broker, "late", on_event=late.append)
        stack.callback(listener.close)
        listener.connect()
        until(lambda: late)
        listener.subscribe([ADDRESS.status("a")])
        until(lambda: statuses(late))
        assert [status.state for status in statuses(late)] == ["online"]


def statuses(heard: list[LinkEvent]) -> list[wire.Status]:
    payloads = [event.payload for event in heard if isinstance(event, Message) and event.topic == ADDRESS.status("a")]
    return [wire.decode(wire.Status, payload, address=ADDRESS, device="a") for payload in payloads]
