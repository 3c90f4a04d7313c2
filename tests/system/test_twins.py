"""Two devices under one id: nothing is counted twice, the connection does not loop madly, and somebody is told."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from edge_sdk import DeviceEvent, EdgeDevice
from edge_sdk.keys import SigningKey
from tests.system.site import Site, until


def twin_of(site: Site, device: str, *, own_key: bool) -> Path:
    """The same id on a second box: with a key of its own, or with a copy of the first one's and a store of its own."""
    folder = site.folder / f"twin-of-{device}"
    shutil.copytree(site.folder / device, folder)
    (folder / "store" / "outbox.sqlite").unlink()
    if own_key:
        (folder / "device.key").unlink()
        SigningKey.generate(folder / "device.key")
    return folder / "device.toml"


@pytest.mark.parametrize("own_key", [True, False], ids=["another key", "the same key"])
def test_two_devices_with_one_id_are_counted_once_and_reported(tmp_path: Path, own_key: bool) -> None:
    # An update of either id closes the round, so that nobody waits for a device that cannot keep its connection.
    site = Site(tmp_path, ["a", "b"], job={"rounds": 1, "round.quorum": 1, "gate.enabled": False})
    twin = twin_of(site, "a", own_key=own_key)
    first: list[DeviceEvent] = []
    second: list[DeviceEvent] = []
    with ExitStack() as stack:
        running = stack.enter_context(site.service())
        began = time.monotonic()
        for config, events in ((site.config("a"), first), (twin, second)):
            stack.enter_context(EdgeDevice.open(config, on_event=events.append)).start()
        if own_key:
            until(lambda: any("does another device use this id?" in event.detail for event in first + second), 60)
        until(lambda: "duplicate_identity" in {alarm.kind for alarm in site.status().alarms})
        seconds = time.monotonic() - began
        takeovers = sum(event.kind == "online" for event in first + second)
        stack.enter_context(EdgeDevice.open(site.config("b"))).start()
        status = running.wait(90)
    assert takeovers < 4 + 2 * seconds  # each takes the connection from the other, but without haste
    assert status.state == "done"
    assert status.duplicated == 0
    assert (status.history[-1].outcome, status.merged) == ("accepted", 1)
    assert {alarm.kind: alarm.device for alarm in status.alarms}["duplicate_identity"] == "a"
    refused = {refusal.reason for refusal in status.refusals}
    assert refused <= ({"bad_signature", "round_closed"} if own_key else {"already_answered", "round_closed"})
