"""A message that nobody foresaw ends neither the gateway nor its conversation with the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aggregator import intake
from edge_sdk import EdgeDevice, wire
from tests.system.hostile import COMMON, HostileDevice
from tests.system.site import Site, until


def test_exception_does_not_stop_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler has a fault that one kind of message of one device brings out."""
    site = Site(
        tmp_path, ["bad", "good"], job={"rounds": 1, "round.devices_wait": 1, "round.quorum": 1, "gate.enabled": False}
    )
    step = intake.step

    def faulty(state: intake.Intake, event: intake.Event) -> Any:
        if isinstance(event, intake.FetchAsked) and event.device == "bad":
            raise ZeroDivisionError("a fault of ours")
        return step(state, event)

    monkeypatch.setattr(intake, "step", faulty)
    with site.service() as running, EdgeDevice.open(site.config("good")) as good:
        until(lambda: running.service._subscribed)
        with HostileDevice(site, "bad") as bad:
            fetch = wire.Fetch(**COMMON, digest="0" * 64, ranges=((0, 0),))
            bad.send(bad.address.fetch("bad"), fetch)
            bad.greet()
            until(lambda: [alarm.kind for alarm in site.status().alarms])
            good.start()
            status = running.wait()
    assert status.state == "done"
    assert {alarm.kind: (alarm.device, alarm.count) for alarm in status.alarms} == {"unhandled_message": ("bad", 1)}
    # It was receipted: a gateway that comes back is not met by it again.
    monkeypatch.undo()
    monkeypatch.setattr(intake, "step", faulty)
    site.change_job(rounds=2)
    with site.service() as running, EdgeDevice.open(site.config("good")) as good:
        good.start()
        status = running.wait()
    assert [alarm.count for alarm in status.alarms] == [1]
