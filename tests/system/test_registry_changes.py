"""The registry while a gateway runs: devices are entered, revoked, and the file is edited badly."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

from edge_sdk import EdgeDevice
from tests.system.hostile import HostileDevice
from tests.system.site import Site, until


def test_the_gateway_hears_of_every_change_and_outlives_a_broken_file(tmp_path: Path) -> None:
    job = {"rounds": 500, "task.steps": 500, "round.devices_wait": 1, "round.quorum": 1, "gate.enabled": False}
    site = Site(tmp_path, ["a", "b"], job=job)
    registry = tmp_path / "devices.json"
    both = registry.read_text()
    rows = json.loads(both)["devices"]

    def put(text: str) -> None:
        """At once: of a file that is emptied and filled again the gateway might see both, and say so twice."""
        new = tmp_path / "devices.json.new"
        new.write_text(text)
        new.replace(registry)

    def write(changed: list[dict]) -> None:
        put(json.dumps({"devices": changed}))

    def known() -> set[str]:
        return {device.device for device in site.status().devices}

    write(rows[:1])
    with ExitStack() as stack:
        stack.enter_context(site.service())
        stack.enter_context(EdgeDevice.open(site.config("a"))).start()
        until(lambda: "a" in known())
        b = stack.enter_context(HostileDevice(site, "b"))
        put(both[:50])  # an editor that saves in two steps
        (alarm,) = until(lambda: site.status().alarms)
        assert (alarm.kind, alarm.count) == ("registry", 1)
        assert "not a JSON file" in alarm.detail
        reached = site.status().round
        until(lambda: site.status().round > reached)  # the devices of before are still heard
        assert known() == {"a"}
        put(both)  # b had been told off before; now it is entered

        def b_is_heard() -> bool:
            b.greet()
            return "b" in known()

        until(b_is_heard)
        write([{**row, "revoked": row["id"] == "b"} for row in rows])

        def seen_of_b() -> list[int]:
            return [device.seen for device in site.status().devices if device.device == "b"]

        def b_is_deaf() -> bool:
            before, now = seen_of_b(), site.status().round
            b.greet()
            until(lambda: site.status().round > now + 1)
            return seen_of_b() == before

        until(b_is_deaf)
        assert site.status().state == "running"
        until(lambda: site.status().history[-1].assigned == ["a"])  # and gets no more tasks
        assert [alarm.count for alarm in site.status().alarms if alarm.kind == "registry"] == [1]
