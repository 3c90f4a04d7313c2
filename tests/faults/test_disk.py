"""A disk that runs full, on the device and on the gateway: a real one, small, and filled to the last byte."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest

from edge_sdk import DeviceEvent, EdgeDevice
from tests.faults.audit import audit
from tests.faults.plant import chunked_site
from tests.system.site import end, spawn, until
from tests.tiny_bundle import HEAD

MIB = 1 << 20


class SmallDisk:
    """A file system of its own, whose free space is taken and given back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def fill(self, leave: int = 0) -> None:
        """Take all of the free space, down to `leave` bytes."""
        with self._ballast.open("ab") as file, suppress(OSError):
            while True:
                usage = os.statvfs(self.folder)
                over = usage.f_bavail * usage.f_frsize - leave
                if over <= 0:
                    break
                file.write(bytes(min(over, MIB)))
                file.flush()

    def free(self) -> None:
        """Give it back."""
        self._ballast.unlink()


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path, int], SmallDisk]]:
    """Mounts a tmpfs of so many MiB over a folder, with what the folder holds."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system; CI runs this test as root")
    mounted: list[Path] = []

    def mount(folder: Path, megabytes: int) -> SmallDisk:
        folder.mkdir(exist_ok=True)
        aside = folder.with_name(folder.name + ".aside")
        folder.rename(aside)
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"this machine mounts no file systems, not even for root: {done.stderr.strip()}")
        mounted.append(folder)
        subprocess.run(["cp", "-a", f"{aside}/.", str(folder)], check=True)
        return SmallDisk(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.faults
def test_a_device_whose_disk_runs_full_while_it_trains_pauses_and_goes_on_when_there_is_room(
    tmp_path: Path, small_disk: Callable[[Path, int], SmallDisk]
) -> None:
    site = chunked_site(tmp_path, ["a"], chunks=3, rounds=1, **{"task.steps": 40})
    disk = small_disk(tmp_path / "a" / "store", 24)
    events: list[DeviceEvent] = []

    def listen(event: DeviceEvent) -> None:
        events.append(event)
        if event == DeviceEvent("task_started", f"{HEAD} of round 1") and events.count(event) == 1:
            disk.fill()

    with ExitStack() as stack:
        running = stack.enter_context(site.service())
        device = stack.enter_context(EdgeDevice.open(site.config("a"), on_event=listen))
        device.start()
        until(lambda: device.status().paused == "disk")
        made = device.status().updates_made
        assert any(event.kind == "error" and "free some disk space" in event.detail for event in events)
        until(lambda: site.status().devices[0].paused == "disk")  # the gateway knows why it has to wait
        assert device.predict(np.zeros((1, site.features), np.float32)).shape == (1, 3)
        disk.free()
        assert running.wait().state == "done"
        status = device.status()
    assert made == 1
    assert status.paused == "none"
    assert (status.updates_made, status.updates_accepted, status.outbox_entries) == (3, 3, 0)
    assert audit(site).merged == 3


@pytest.mark.faults
def test_a_gateway_whose_disk_is_full_makes_devices_wait_and_goes_on_when_there_is_room(
    tmp_path: Path, small_disk: Callable[[Path, int], SmallDisk]
) -> None:
    site = chunked_site(tmp_path, ["a", "b"], chunks=4, rounds=2)
    disk = small_disk(tmp_path / "state", 40)
    with ExitStack() as stack:
        running = stack.enter_context(site.service(reserve_bytes=0))
        devices = [stack.enter_context(EdgeDevice.open(site.config(name))) for name in site.ids]
        until(lambda: site.status().broker)
        for device in devices:
            device.start()
        until(lambda: site.status().round >= 1)
        disk.fill()
        until(lambda: running.service._blocked)
        merged = site.status().merged
        until(lambda: all(device.status().outbox_entries for device in devices))  # they wait, and keep what they made
        disk.free()
        status = running.wait(90)
    assert status.state == "done"
    assert status.merged > merged
    assert "disk_full" in {alarm.kind for alarm in status.alarms}
    assert audit(site).models == 2


@pytest.mark.faults
def test_a_finished_job_makes_room_for_its_model_on_a_disk_that_is_almost_full(
    tmp_path: Path, small_disk: Callable[[Path, int], SmallDisk]
) -> None:
    site = chunked_site(tmp_path, ["a"], chunks=12, rounds=1)
    disk = small_disk(tmp_path / "state", 40)

    def listen(event: DeviceEvent) -> None:
        if event.kind == "task_done" and device.status().updates_made == 2:
            device.pause()  # before the evaluation that ends the job

    with ExitStack() as stack:
        running = stack.enter_context(site.service(reserve_bytes=0))
        device = stack.enter_context(EdgeDevice.open(site.config("a"), on_event=listen))
        device.start()
        until(lambda: (site.status().round, site.status().phase) == (1, "evaluate"))
        disk.fill(leave=400_000)  # enough for the ledger, too little for another model
        device.start()
        assert running.wait().state == "done"  # the model before it was deleted first
        assert (tmp_path / "state" / "model.safetensors").stat().st_size > 400_000
        disk.free()
    assert audit(site).models == 1


@pytest.mark.faults
def test_below_the_reserve_nothing_new_is_accepted_and_an_alarm_says_so(
    tmp_path: Path, small_disk: Callable[[Path, int], SmallDisk]
) -> None:
    site = chunked_site(tmp_path, ["a"], chunks=3, rounds=1)
    disk = small_disk(tmp_path / "state", 64)
    disk.fill(leave=6 * MIB)  # the default reserve is a tenth
    with ExitStack() as stack:
        stack.enter_context(site.service())
        device = stack.enter_context(EdgeDevice.open(site.config("a")))
        device.start()
        until(lambda: device.status().outbox_entries == 1)
        until(lambda: "disk_full" in {alarm.kind for alarm in site.status().alarms})
        until(lambda: device._state.held)  # it was told to wait
        assert site.status().accepted == 0
        assert device.status().outbox_entries == 1


def test_a_damaged_model_ends_the_gateway_with_4_and_names_the_file(tmp_path: Path) -> None:
    site = chunked_site(tmp_path, ["a"], chunks=3, rounds=9)
    with EdgeDevice.open(site.config("a")) as device:
        device.start()
        with site.service():
            until(lambda: site.status().round >= 2)
        for blob in (tmp_path / "state" / "blobs").iterdir():
            blob.write_bytes(b"\xff" + blob.read_bytes()[1:])
        gateway = site.gateway_process()
        try:
            assert gateway.wait(60) == 4
        finally:
            end(gateway)
    log = (tmp_path / "gateway.log").read_text()
    assert "the bytes do not match the file's name; restore the state folder" in log
    assert "Traceback" not in log
    assert site.status().alarms == []


_WITHOUT_SPACE_FOR_A_WHILE = """
import logging, resource, signal, sys, threading
from edge_sdk import EdgeDevice
logging.basicConfig(level=logging.INFO)
stop = threading.Event(); signal.signal(signal.SIGTERM, lambda *_: stop.set())
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
left, errors = [sys.argv[2]], []
def listen(event):
    if event.kind == "error":
        errors.append(event.detail)
    if event.kind in left:
        left.clear()
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, unlimited[1]))
        threading.Timer(1.5, resource.setrlimit, (resource.RLIMIT_FSIZE, unlimited)).start()
with EdgeDevice.open(sys.argv[1], on_event=listen) as device:
    device.start(); stop.wait()
print(errors)  # not even a log could be written before
"""


@pytest.mark.faults
@pytest.mark.parametrize("moment", ["online", "task_done"])
def test_a_device_that_cannot_write_for_a_while_goes_on_afterwards_without_waiting_for_the_deadline(
    tmp_path: Path, moment: str
) -> None:
    site = chunked_site(tmp_path, ["a"], chunks=3, rounds=1)
    gateway = site.gateway_process()
    device = spawn(["-c", _WITHOUT_SPACE_FOR_A_WHILE, str(site.config("a")), moment], tmp_path / "a.log", {})
    try:
        assert gateway.wait(25) == 0, (tmp_path / "gateway.log").read_text()
    finally:
        end(device)
        end(gateway)
    assert "free some disk space" in (tmp_path / "a.log").read_text()
    assert audit(site).merged == 3
