"""The books do not depend on which broker carries the messages, nor in which version of MQTT (transport.md, rule 5)."""

from __future__ import annotations

import sqlite3
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from aggregator.broker import Broker
from aggregator.job import BrokerSettings
from edge_sdk import EdgeDevice
from edge_sdk.link import Link
from tests.faults.audit import audit
from tests.faults.plant import chunked_site
from tests.system.site import until

KINDS = [(kind, version) for kind in ("mosquitto", "iotcore") for version in ("5", "3.1.1")]


@pytest.fixture(scope="module")
def ledgers() -> dict[tuple[str, str], list[tuple]]:
    return {}


@pytest.mark.faults
@pytest.mark.parametrize(("kind", "version"), KINDS)
def test_every_broker_leads_to_the_same_ledger(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ledgers: dict[tuple[str, str], list[tuple]],
    kind: str,
    version: str,
) -> None:
    """Gateway and device are started again while an update of two chunks is on its way."""
    defaults = Link.__init__.__kwdefaults__
    assert defaults is not None
    broker = Broker(tmp_path / "broker", BrokerSettings(url=None, port=0), kind=kind)
    with ExitStack() as stack:
        stack.callback(broker.stop)
        broker.start()
        monkeypatch.setitem(defaults, "version", version)
        site = chunked_site(tmp_path, ["a"], chunks=2, rounds=1, broker=broker.urls[version])
        with site.service() as running, EdgeDevice.open(site.config("a")) as device:
            device.start()
            until(lambda: site.status().round == 1)
            until(lambda: device.status().updates_made == 2)
            running.service.stop()
            running.wait()
        with site.service() as running, EdgeDevice.open(site.config("a")) as device:
            device.start()
            assert running.wait(40).state == "done"
            until(lambda: not device.status().outbox_entries)
    assert audit(site, allowed=frozenset()).merged == 3
    with closing(sqlite3.connect(tmp_path / "state" / "journal.sqlite")) as db:
        rows = db.execute("SELECT device, seq, round, phase, digest, merged_in FROM ledger ORDER BY device, seq")
        ledgers[kind, version] = rows.fetchall()
    assert ledgers[kind, version] == next(iter(ledgers.values()))
