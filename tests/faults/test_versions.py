"""Gateway and devices are not upgraded at the same moment (transport.md, section 4.1)."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from edge_sdk import DeviceEvent, EdgeDevice, wire
from edge_sdk.keys import SigningKey
from tests.system.site import Site, until

ADDRESS = wire.Address("", "test", "tiny")


def test_fields_of_a_later_minor_version_are_ignored_by_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = wire._plain

    def of_a_later_version(value: Any) -> Any:
        found = plain(value)
        return {**found, "since_1_1": {"unit": "C", "values": [1, 2]}} if isinstance(value, wire.Message) else found

    monkeypatch.setattr(wire, "_plain", of_a_later_version)
    site = Site(tmp_path, ["a"], job={"rounds": 1})
    with site.service() as running, EdgeDevice.open(site.config("a")) as device:
        device.start()
        status = running.wait()
        assert device.status().refused_messages == 0
    assert (status.state, status.merged, status.refused) == ("done", 3, {})


def test_an_update_of_another_major_version_is_refused_by_name_and_kept_in_quarantine(tmp_path: Path) -> None:
    """A device was given back its former program while an update of the later one waited."""
    site = Site(tmp_path, ["a"], job={"rounds": 1, "gate.enabled": False})
    events: list[DeviceEvent] = []

    def listen(event: DeviceEvent) -> None:
        events.append(event)
        if event.kind == "task_done":
            device.stop()

    with site.service() as running:
        with EdgeDevice.open(site.config("a"), on_event=listen) as device:
            device._carry_out = _without_offers(device)  # type: ignore[method-assign]
            device.start()
            until(lambda: device.status().outbox_entries == 1 and device._shift.worker.is_alive() is False)
        upload = _make_it_of_version_2(site, "a")
        with EdgeDevice.open(site.config("a"), on_event=events.append) as device:
            device.start()
            until(device._outbox.quarantined)
            assert device._outbox.quarantined() == [(upload, "unsupported_version")]
            assert device.status().outbox_entries == 0
        until(lambda: site.status().refusals)
        running.service.stop()
    (refusal,) = site.status().refusals
    assert (refusal.reason, refusal.upload) == ("unsupported_version", upload)
    assert refusal.detail == "version 2 of the protocol, this gateway speaks 1"
    assert [alarm.kind for alarm in site.status().alarms] == ["unsupported_version"]
    assert any(event.kind == "update_rejected" and "unsupported_version" in event.detail for event in events)


def _without_offers(device: EdgeDevice) -> Any:
    carry_out = device._carry_out

    def act(effect: Any) -> None:
        if type(effect).__name__ != "PublishOffer":
            carry_out(effect)

    return act


def _make_it_of_version_2(site: Site, device: str) -> str:
    """Sign the waiting offer anew, as a program would that speaks version 2; returns the upload's name."""
    key = SigningKey.load(site.folder / device / "device.key")
    with closing(sqlite3.connect(site.folder / device / "store" / "outbox.sqlite")) as db:
        upload, offer = db.execute("SELECT upload, offer FROM entry").fetchone()
        content = {**json.loads(bytes(offer).partition(b"\n")[0]), "v": 2, "size": "65 KiB"}
        text = json.dumps(content, separators=(",", ":")).encode()
        signed = wire._signed_text(ADDRESS, device, "offer", text)
        db.execute("UPDATE entry SET offer=?", (text + b"\n" + wire.base64.b64encode(key.sign(signed)),))
        db.commit()
    return str(upload)
