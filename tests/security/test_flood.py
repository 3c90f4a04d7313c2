"""S15: an enrolled device that sends far too much costs itself, not the gateway and not the others."""

from __future__ import annotations

import re
import sqlite3
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest

from edge_sdk import EdgeDevice, wire
from edge_sdk.errors import LinkError
from edge_sdk.wire import CHUNK, Verdict
from tests.system.hostile import HostileDevice
from tests.system.site import Site, end, until

MIB = 1 << 20


@pytest.mark.parametrize(
    ("orphans", "offers"),
    [(1500, 150), pytest.param(10_000, 1000, marks=pytest.mark.soak)],
)
def test_chunk_flood_is_bounded(tmp_path: Path, orphans: int, offers: int) -> None:
    job = {"rounds": 1, "gate.enabled": False, "round.devices_wait": 1, "round.quorum": 1}
    site = Site(tmp_path, ["bad", "good"], job=job)
    gateway = site.gateway_process()
    try:
        until(lambda: site.status().broker)
        with HostileDevice(site, "bad") as bad, EdgeDevice.open(site.config("good")) as good:
            task = bad.wait_for_task()
            before = resident(gateway.pid)
            disk = stored(tmp_path)
            for number in range(orphans):  # of uploads that were never offered
                send(
                    bad,
                    f"{bad.outbox_id[:8]}-{number:08d}-{'0' * 12}",
                    number % 7,
                    bytes(CHUNK if number < 100 else 64),
                )
            for number in range(offers):
                offer = bad.offer(b"x" * 100, seq=number + 2, task="f" * 16)
                topic = bad.address.offer("bad")
                patiently(lambda topic=topic, offer=offer: bad.send(topic, offer))
            bad.hear(lambda _: len(bad.acks) >= offers, 60)
            waits = [ack for ack in bad.acks if ack.status is Verdict.WAIT]
            assert len(waits) >= offers - 12
            assert all(ack.retry_after_ms >= 500 for ack in waits)
            assert resident(gateway.pid) - before < 16 * MIB
            assert stored(tmp_path) - disk < 2 * MIB
            with closing(sqlite3.connect(tmp_path / "state" / "journal.sqlite")) as db:
                assert db.execute("SELECT (SELECT count(*) FROM part), (SELECT count(*) FROM offer)").fetchone() == (
                    0,
                    0,
                )
            assert task.task == bad.wait_for_task().task
            good.start()
            assert gateway.wait(60) == 0, (tmp_path / "gateway.log").read_text()[-2000:]
    finally:
        end(gateway)
    assert site.status().merged == 1
    assert sum(site.status().refused.values()) <= 12


def send(device: HostileDevice, upload: str, index: int, data: bytes) -> None:
    topic = device.address.chunk(device.device, wire.AGGREGATOR, upload, index)
    patiently(lambda: device.link.publish(topic, data))


def patiently(act: object) -> None:
    """Again until the client's own queue has room: what is tested is the gateway."""
    assert callable(act)
    while True:
        with suppress(LinkError):
            act()
            return
        time.sleep(0.002)


def resident(pid: int) -> int:
    """Bytes in memory."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def stored(folder: Path) -> int:
    """Bytes of the journal and the blobs, its log among them."""
    state = folder / "state"
    return sum(path.stat().st_size for path in [*state.glob("journal*"), *(state / "blobs").iterdir()])
