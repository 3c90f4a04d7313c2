"""Revocation: all of it, at any step repeatable, and what the gateway makes of it."""

from __future__ import annotations

import datetime as dt
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from aggregator.broker import Broker, Security
from aggregator.job import BrokerSettings
from devices.authority import LEAF_LIFE, make_key, new_serial, write
from devices.control import BrokerAbsentError, Control
from devices.enroll import EnrolError, audit_log, revoke
from devices.registry import Registry
from devices.roles import initial_config
from edge_sdk import DeviceEvent, EdgeDevice
from edge_sdk.tls import client_context
from edge_sdk.wire import AGGREGATOR, Address
from tests.devices.test_enroll import command
from tests.security.rig import SITE, Client, Rig, refused_by_tls
from tests.system.site import Site, until

STEPS = ["V1", "V2", "C1", "V3", "V4", "Z1"]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig(tmp_path) as started:
        yield started


@pytest.mark.parametrize("point", STEPS)
def test_revocation_may_be_killed_at_any_step_and_repeated(rig: Rig, point: str) -> None:
    session, before = rig.client("dev-001").connect(), rig.broker.pid
    arguments = ("revoke", "dev-001", "--ca", rig.folder.root)
    assert command(*arguments, fault=point).returncode == -signal.SIGKILL
    if point in ("Z1", "V3", "V4"):
        rig.await_restart(before)  # the list was written: the repetition must find a broker
    result = command(*arguments)
    assert result.returncode == 0, result.stderr
    assert session.lost.wait(1.0)
    assert Registry.load(rig.folder.registry).entries["dev-001"].revoked
    (issued,) = rig.authority.issued("dev-001")
    assert rig.authority.is_revoked(issued.serial)
    assert [line["action"] for line in audit_log(rig.authority)] == ["enroll", "enroll", "revoke"]
    assert not list((rig.folder.authority / "pending").iterdir())
    rig.await_restart(before)
    with Control(rig.url, rig.identity("enroller")) as control:
        assert control.roles_of("dev-001") == []
    assert refused_by_tls(rig.client("dev-001").connect)
    assert rig.client("dev-002").connect().publish(SITE.metrics("dev-002")).refused == ""


def test_an_enrolment_that_was_interrupted_can_be_revoked(rig: Rig) -> None:
    arguments = ("--job", "j", "--bundle", "b", "--control-key", rig.keys["control_public"], "--out", rig.root / "x")
    enrolment = ("enroll", "dev-003", "--ca", rig.folder.root, *arguments)
    assert command(*enrolment, fault="E4").returncode == -signal.SIGKILL
    assert revoke(rig.authority, "dev-003").confirmed
    (issued,) = rig.authority.issued("dev-003")
    assert rig.authority.is_revoked(issued.serial)
    with Control(rig.url, rig.identity("enroller")) as control:
        assert control.roles_of("dev-003") == []


def test_a_device_that_never_was_cannot_be_revoked(rig: Rig) -> None:
    with pytest.raises(EnrolError, match="nothing to revoke"):
        revoke(rig.authority, "dev-009")


def test_without_a_broker_list_and_registry_are_done_and_the_command_says_what_is_left(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    with pytest.raises(BrokerAbsentError, match="repeat this while the broker runs"):
        revoke(rig.authority, "dev-001")
    assert Registry.load(rig.folder.registry).entries["dev-001"].revoked
    assert [line["action"] for line in audit_log(rig.authority)] == ["enroll", "enroll"]
    with rig:
        assert revoke(rig.authority, "dev-001").confirmed
    assert audit_log(rig.authority)[-1]["action"] == "revoke"


def test_a_round_goes_on_without_a_device_that_was_shut_out_in_the_middle(tmp_path: Path) -> None:
    """`b` is online with a task and never answers; its revocation lets the round close at once."""
    job = {"rounds": 1, "round.deadline_seconds": 600, "round.devices_wait": 1}
    site = Site(tmp_path, ["a", "b"], tls=True, job=job)
    assert site.authority is not None
    with ExitStack() as stack:
        running = stack.enter_context(site.service())
        mute = stack.enter_context(EdgeDevice.open(site.config("b")))
        mute.start()
        mute.pause()
        until(lambda: site.status().assigned == 1)
        honest = stack.enter_context(EdgeDevice.open(site.config("a")))
        honest.start()
        until(lambda: site.status().answered == 1)
        assert (site.status().round, site.status().assigned) == (0, 2)
        assert revoke(site.authority, "b").confirmed
        status = running.wait(60)
        assert mute.status().updates_accepted == 0
    assert status.state == "done"
    assert {device.device: device.online for device in status.devices} == {"a": True, "b": False}
    assert [record.outcome for record in status.history][1:] == ["accepted"]
    assert status.history[1].assigned == ["a"]


@pytest.mark.parametrize("phase", ["train", "evaluate"])
def test_with_discard_round_nothing_that_a_revoked_device_gave_counts_in_the_open_round(
    tmp_path: Path, phase: str
) -> None:
    """`bad` has answered; `good` holds the phase open until `bad` is revoked."""
    job = {"rounds": 1, "round.deadline_seconds": 600, "gate.enabled": phase == "evaluate"}
    site = Site(tmp_path, ["bad", "good"], tls=True, job=job)
    assert site.authority is not None
    with ExitStack() as stack:
        running = stack.enter_context(site.service())
        good, bad = (stack.enter_context(EdgeDevice.open(site.config(name))) for name in ("good", "bad"))

        def hold(event: DeviceEvent) -> None:
            if event.kind == "task_done" and good.status().updates_made == (2 if phase == "evaluate" else 0):
                good.pause()

        good.on_event = hold
        good.start()
        if phase == "train":
            good.pause()
        bad.start()
        until(lambda: (site.status().phase, site.status().answered, site.status().round) == (phase, 1, 1))
        assert revoke(site.authority, "bad", discard_round=True).confirmed
        good.start()
        status = running.wait(60)
    first = status.history[-1]
    assert status.set_aside["revoked"] == 1
    if phase == "train":
        assert (first.outcome, first.merged) == ("accepted", 1)
        assert first.declined == {"bad": "revoked"}
    else:
        assert (first.outcome, first.model) == ("rolled_back", first.start)
        assert first.reason == "the candidate was made with an update of bad, which was revoked"


def test_a_certificate_of_the_gateway_that_nears_its_end_is_an_alarm(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a"], samples=5, tls=True)
    assert site.authority is not None
    files = site.authority.folder.identity(AGGREGATOR)
    began = dt.datetime.now(dt.UTC) - LEAF_LIFE * 0.7
    write(
        files.certificate, site.authority.issue(AGGREGATOR, make_key(files.key).public_key(), new_serial(), now=began)
    )
    with site.service():
        until(lambda: site.status().alarms)
    (alarm,) = site.status().alarms
    assert alarm.kind == "certificate_aggregator"
    assert alarm.detail.endswith("`edgewise devices renew aggregator`")


def test_what_the_broker_retains_of_a_revoked_device_is_cleared(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a", "b"], tls=True, job={"rounds": 1, "round.devices_wait": 3})
    assert site.authority is not None
    address = Address("", "test", "tiny")
    with ExitStack() as stack:
        stack.enter_context(site.service())
        for name in ("a", "b"):
            stack.enter_context(EdgeDevice.open(site.config(name))).start()
        until(lambda: sum(device.online for device in site.status().devices) == 2)
        assert revoke(site.authority, "b").confirmed
        until(lambda: [device.online for device in site.status().devices if device.device == "b"] == [False])
    # The same broker, without the gateway, whose place the spy takes.
    files = site.authority.folder
    roles = initial_config("", "test", ["a"])
    settings = BrokerSettings(url=None, port=site.port)
    broker = Broker(site.folder / "state" / "broker", settings, security=Security(files.gateway, lambda: roles))
    broker.start()
    spy = Client(site.broker, client_context(files.identity("aggregator")), "aggregator")
    try:
        spy.connect().subscribe(f"{address.root}/dev/+/up/#")
        assert {topic for topic, payload in spy.heard(1.0) if payload} == {address.status("a")}
    finally:
        spy.close()
        broker.stop()
