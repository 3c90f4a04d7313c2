"""A device without a clock of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.audit import audit
from tests.faults.plant import chunked_site
from tests.system.site import end, spawn, until

_IN_1970 = """
import signal, sys, threading, time
began = time.monotonic()
time.time = lambda: time.monotonic() - began
time.time_ns = lambda: int(time.time() * 1e9)
from edge_sdk import EdgeDevice
stop = threading.Event(); signal.signal(signal.SIGTERM, lambda *_: stop.set())
with EdgeDevice.open(sys.argv[1], on_event=lambda event: print(event.kind, device.status().clock, flush=True)) as device:
    print("opened", device.status().clock, flush=True)
    device.start(); stop.wait()
"""


@pytest.mark.faults
def test_a_device_in_1970_connects_trains_and_is_believed(tmp_path: Path) -> None:
    site = chunked_site(tmp_path, ["a"], chunks=1, rounds=1)
    gateway = site.gateway_process()
    device = spawn(["-c", _IN_1970, str(site.config("a"))], tmp_path / "a.log", {})
    try:
        assert gateway.wait(60) == 0, (tmp_path / "gateway.log").read_text()
        until(lambda: (tmp_path / "a.log").read_text().count("update_accepted") == 3)
    finally:
        end(device)
        end(gateway)
    told = [line.split() for line in (tmp_path / "a.log").read_text().splitlines()]
    clocks = dict(told)
    assert clocks["opened"] == "unset"
    assert clocks["task_started"] == "synced"  # never before the gateway has told the time
    assert audit(site, allowed=frozenset()).merged == 3
