"""Offers that come again, and messages that are no longer true."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from edge_sdk import wire
from edge_sdk.tensors import pack
from edge_sdk.wire import Reason, Verdict
from tests.system.hostile import HostileDevice
from tests.system.site import Running, Site, until
from tests.tiny_bundle import HEAD


def honest_body(device: HostileDevice, change: float = 0.01) -> bytes:
    deltas = {"weight": np.full((3, 4), change, np.float32), "bias": np.full(3, change, np.float32)}
    start = device.wait_for_task().start
    return pack(deltas, {"edgewise": "update/1", "program": HEAD, "start": start, "encoding": "float32"})


@pytest.fixture
def open_round(tmp_path: Path) -> Iterator[tuple[Site, Running, HostileDevice, HostileDevice]]:
    """A round with two devices, `a` and `b`, that stays open until both have answered."""
    site = Site(tmp_path, ["a", "b"], job={"rounds": 1, "gate.enabled": False})
    with ExitStack() as stack:
        running = stack.enter_context(site.service())
        until(lambda: running.service._subscribed)
        a, b = (stack.enter_context(HostileDevice(site, name)) for name in site.ids)
        a.wait_for_task()
        yield site, running, a, b


def test_an_offer_after_acceptance_is_accepted_again_and_adds_nothing(
    open_round: tuple[Site, Running, HostileDevice, HostileDevice],
) -> None:
    site, running, a, b = open_round
    data = honest_body(a)
    offer = a.offer(data)
    assert a.deliver(data, offer).status is Verdict.ACCEPTED
    sent = a.link.bytes_sent
    for _ in range(3):
        a.acks.clear()
        assert a.deliver(data, offer).status is Verdict.ACCEPTED
    assert a.link.bytes_sent - sent < 3 * 2048  # offers only: nobody asked for the body again
    assert site.status().accepted == 1
    data = honest_body(b)
    assert b.deliver(data, b.offer(data)).status is Verdict.ACCEPTED
    status = running.wait()
    assert (status.accepted, status.merged, status.duplicated) == (2, 2, 0)
    assert status.refusals == []


def test_the_same_number_with_another_body_is_a_conflict_and_an_alarm(
    open_round: tuple[Site, Running, HostileDevice, HostileDevice],
) -> None:
    site, _, a, _ = open_round
    data, other = honest_body(a), honest_body(a, 0.02)
    assert a.deliver(data, a.offer(data)).status is Verdict.ACCEPTED
    assert a.deliver(other, a.offer(other)).reason is Reason.SEQ_CONFLICT
    assert {alarm.kind for alarm in site.status().alarms} == {"seq_conflict"}
    assert site.status().accepted == 1


def test_a_second_outbox_of_one_device_answers_no_task_twice(
    open_round: tuple[Site, Running, HostileDevice, HostileDevice],
) -> None:
    site, _, a, _ = open_round
    data = honest_body(a)
    assert a.deliver(data, a.offer(data)).status is Verdict.ACCEPTED
    a.outbox_id = "f" * 16
    assert a.deliver(data, a.offer(data)).reason is Reason.ALREADY_ANSWERED
    assert site.status().accepted == 1
    assert {alarm.kind for alarm in site.status().alarms} <= {"duplicate_identity"}


def test_an_offer_of_one_device_is_worth_nothing_in_the_name_of_another(
    open_round: tuple[Site, Running, HostileDevice, HostileDevice],
) -> None:
    site, _, a, b = open_round
    data = honest_body(a)
    captured = wire.encode(a.offer(data), a.key, a.address, "a")
    b.link.publish(b.address.offer("b"), captured)
    ack = b.hear(lambda _: b.acks and b.acks[-1])
    assert ack.reason is Reason.BAD_SIGNATURE
    assert a.deliver(data, a.offer(data)).status is Verdict.ACCEPTED
    assert site.status().accepted == 1


def test_an_offer_of_a_closed_round_is_refused_though_it_was_never_accepted(tmp_path: Path) -> None:
    """S12: captured in round 1, which closed without it, and sent in round 2."""
    site = Site(tmp_path, ["a", "b"], job={"rounds": 2, "gate.enabled": False, "round.quorum": 1})
    with site.service() as running, ExitStack() as stack:
        until(lambda: running.service._subscribed)
        a, b = (stack.enter_context(HostileDevice(site, name)) for name in site.ids)
        held = a.offer(honest_body(a))
        data = honest_body(b)
        assert b.deliver(data, b.offer(data)).status is Verdict.ACCEPTED
        until(lambda: site.status().round == 2)
        assert a.deliver(honest_body(a), held).reason is Reason.ROUND_CLOSED
        assert site.status().accepted == 1
        assert [refusal.reason for refusal in site.status().refusals] == ["round_closed"]


def test_a_corrupt_transfer_is_asked_for_once_more_and_then_counts(
    open_round: tuple[Site, Running, HostileDevice, HostileDevice],
) -> None:
    site, _, a, _ = open_round
    data = honest_body(a)
    offer = a.offer(data)
    a.send(a.address.offer("a"), offer)
    a.hear(lambda _: a.acks)
    spoilt = bytes([data[0], *data[1:-1], data[-1] ^ 1])
    a.chunk(offer.upload, 0, data[:-1])  # too short: never stored
    a.chunk(offer.upload, 5, data)  # no such index: never stored
    a.chunk(offer.upload, 0, spoilt)
    a.hear(lambda _: len([ack for ack in a.acks if ack.status is Verdict.NEED]) == 2)
    for _ in range(3):  # duplicates change nothing
        a.chunk(offer.upload, 0, data)
    assert a.hear(lambda _: next((ack for ack in a.acks if ack.final), None)).status is Verdict.ACCEPTED
    assert site.status().accepted == 1
