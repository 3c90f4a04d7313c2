"""What an app can rely on: predictions go first, limits are kept, and a device goes on where it was."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk import DeviceEvent, EdgeDevice
from edge_sdk import conversation as talk
from edge_sdk.config import DeviceConfig
from edge_sdk.device import _Look, _reason
from edge_sdk.errors import StorageError, TaskError
from edge_sdk.wire import Paused
from tests.system.site import Site, until
from tests.tiny_bundle import HEAD, LORA, tiny_data

ENDLESS = {"rounds": 1, "task.steps": 1_000_000, "round.deadline_seconds": 60}


def test_a_prediction_waits_for_one_step_at_most(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a"], job=ENDLESS)
    x, _ = tiny_data(1)
    with site.service(), EdgeDevice.open(site.config("a")) as device:
        device.start()
        until(lambda: device.status().step > 10)
        passed = []
        for _ in range(300):
            before = device._progress[0]
            device.predict(x[0])
            passed.append(device._progress[0] - before)
        assert device.status().step > 10  # it was training all the time
    assert max(passed) <= 1


def test_training_goes_on_while_predictions_never_end(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a"], job=ENDLESS)
    x, _ = tiny_data(1)
    done = threading.Event()

    def serve(device: EdgeDevice) -> None:
        while not done.is_set():
            device.predict(x[0])

    with site.service(), EdgeDevice.open(site.config("a")) as device:
        device.start()
        until(lambda: device.status().step > 0)
        threads = [threading.Thread(target=serve, args=(device,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        before = device.status().step
        until(lambda: device.status().step > before + 5, 30)
        done.set()
        for thread in threads:
            thread.join()


def test_pause_stops_between_two_steps_and_start_goes_on(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a"], job={"rounds": 1, "task.steps": 20_000})
    events: list[str] = []
    with (
        site.service() as running,
        EdgeDevice.open(site.config("a"), on_event=lambda event: events.append(event.kind)) as device,
    ):
        device.start()
        until(lambda: site.status().phase == "train" and device.status().step > 0)
        device.pause()
        until(lambda: device.status().paused == "user")
        until(lambda: "paused" in events)
        held = device.status().step
        device.predict(tiny_data(1)[0][0])
        assert site.status().phase == "train"
        assert device.status().step <= held + 1
        device.start()
        running.wait()
        assert device.status().updates_accepted == 3  # measured, trained, measured
    assert events.count("resumed") == 1


def test_a_task_ends_with_what_it_has_when_its_time_is_used_up(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a"], job=ENDLESS, limits={"seconds": 1})
    with site.service() as running, EdgeDevice.open(site.config("a")) as device:
        device.start()
        status = running.wait(40)
    assert status.history[-1].merged == 1


def test_training_waits_until_the_device_is_cooler(tmp_path: Path) -> None:
    zone = tmp_path / "zones" / "thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "temp").write_text("81000\n")
    site = Site(tmp_path, ["a"], job={"rounds": 1}, limits={"temperature_celsius": 75})
    config = DeviceConfig.load(site.config("a"))
    with site.service() as running, EdgeDevice(config, thermal_zones=tmp_path / "zones") as device:
        device.start()
        until(lambda: device.status().paused == "heat")
        assert device.status().temperature == 81.0
        assert device.status().updates_made == 0
        (zone / "temp").write_text("74000\n")  # below the limit, but not by enough to begin again
        with pytest.raises(AssertionError, match="did not come true"):
            until(lambda: device.status().paused != "heat", 3)
        (zone / "temp").write_text("70000\n")
        status = running.wait()
    assert status.history[-1].merged == 1


def test_a_task_that_is_withdrawn_in_the_heat_leaves_nobody_paused(tmp_path: Path) -> None:
    zone = tmp_path / "zones" / "thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "temp").write_text("81000\n")
    site = Site(tmp_path, ["a"], job={"rounds": 1, "round.deadline_seconds": 2}, limits={"temperature_celsius": 75})
    config = DeviceConfig.load(site.config("a"))
    events: list[str] = []
    with (
        site.service(),
        EdgeDevice(
            config, thermal_zones=tmp_path / "zones", on_event=lambda event: events.append(event.kind)
        ) as device,
    ):
        device.start()
        until(lambda: device.status().paused == "heat")
        until(lambda: "task_cancelled" in events)
        (zone / "temp").write_text("40000\n")
        until(lambda: device.status().paused == "none", 5)


def test_an_outbox_that_cannot_be_read_for_a_while_does_not_end_the_conversation(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a"], job={"rounds": 1})
    events: list[DeviceEvent] = []
    with EdgeDevice.open(site.config("a"), on_event=events.append) as device:
        device.start()  # nobody answers: it tries again by a timer
        until(lambda: "offline" in [event.kind for event in events])
        with contextlib.closing(sqlite3.connect(tmp_path / "a" / "store" / "outbox.sqlite")) as other:
            other.execute("ALTER TABLE entry RENAME TO lost")
            until(lambda: any("outbox cannot be read" in event.detail for event in events))
            other.execute("ALTER TABLE lost RENAME TO entry")
        with site.service() as running:
            assert running.wait().history[-1].merged == 1


def test_an_unforeseen_error_in_a_timer_does_not_end_the_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_sdk.device._LOOK_AGAIN", 0.1)
    site = Site(tmp_path, ["a"], samples=5)
    zones = tmp_path / "zones"
    events: list[DeviceEvent] = []
    with EdgeDevice.open(site.config("a"), on_event=events.append) as device:
        device._thermal_zones = None  # type: ignore[assignment]
        device.config = replace(device.config, limits=replace(device.config.limits, temperature_celsius=75))
        device.start()
        device._put(talk.Gate(0.0, Paused.HEAT))
        device._put(_Look(0.0))
        until(lambda: any("AttributeError" in event.detail for event in events))
        device._thermal_zones = zones
        device._put(_Look(0.0))
        until(lambda: device.status().paused == "none", 5)


def test_a_callback_that_fails_changes_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a"], job={"rounds": 1})

    def broken(event: DeviceEvent) -> None:
        raise RuntimeError(event.kind)

    with site.service() as running, EdgeDevice.open(site.config("a"), on_event=broken) as device:
        device.start()
        assert running.wait().history[-1].merged == 1


def test_a_new_process_serves_the_model_that_was_served_last_without_any_link(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a"], job={"program": LORA, "rounds": 2, "merge.rule": "product_svd"})
    x, _ = tiny_data(20, seed=5)
    with site.service() as running, EdgeDevice.open(site.config("a")) as device:
        first = device.predict(x)
        device.start()
        model = running.wait().model
        until(lambda: device.status().model == model)
        served = device.predict(x)
    with EdgeDevice.open(site.config("a")) as again:  # never started
        assert again.status().model == model
        np.testing.assert_array_equal(again.predict(x), served)
    assert np.abs(served - first).max() > 0.1


def test_a_program_named_in_the_file_is_kept_whatever_the_gateway_trains(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a"], job={"program": LORA, "rounds": 1, "merge.rule": "product_svd"})
    with site.config("a").open("a") as file:
        file.write(f'program = "{HEAD}"\n')
    x, _ = tiny_data(20, seed=5)
    with site.service() as running, EdgeDevice.open(site.config("a")) as device:
        first = device.predict(x)
        device.start()
        assert running.wait().history[-1].merged == 1
        np.testing.assert_array_equal(device.predict(x), first)


def test_a_device_is_closed_once_and_for_all(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a"])
    device = EdgeDevice.open(site.config("a"))
    device.start()
    device.close()
    device.close()
    with pytest.raises(TaskError, match="open it again"):
        device.start()


def test_a_pause_ends_when_whoever_wanted_it_ends_it(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a"], samples=5)
    with EdgeDevice.open(site.config("a")) as device:
        device.start()
        device.pause()
        device._perform(talk.SetPaused(False))  # the gateway's RESUME
        until(lambda: device.status().paused == "user")
        device._perform(talk.SetPaused(True))
        device.start()
        assert device._brake(Paused.NONE) is Paused.USER
        device._perform(talk.SetPaused(False))
        until(lambda: device.status().paused == "none")


def test_a_pause_that_the_gateway_ordered_holds_over_a_restart(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a"], samples=5)
    with EdgeDevice.open(site.config("a")) as device:
        device._perform(talk.SetPaused(True))
    with EdgeDevice.open(site.config("a")) as device:
        device.start()
        assert device.status().paused == "user"
        device._perform(talk.SetPaused(False))
        until(lambda: device.status().paused == "none")
    with EdgeDevice.open(site.config("a")) as device:
        assert device.status().paused == "none"


def test_a_timer_fires_while_events_never_cease(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a"], samples=5)
    with EdgeDevice.open(site.config("a")) as device:
        device.start()
        until(lambda: device._timers)  # nobody answers: it will try again
        before = device._state.connection

        def again() -> bool:
            for _ in range(5000):
                device._put(talk.Gate(0.0, Paused.NONE))
            return device._state.connection > before

        until(again, 10)


def test_a_callback_may_stop_and_the_app_may_start_again(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a"], job={"rounds": 1})
    devices: list[EdgeDevice] = []
    events: list[str] = []

    def stop_when_offline(event: DeviceEvent) -> None:
        events.append(event.kind)
        if event.kind == "offline" and "stopped" not in events:
            devices[0].stop()
            with pytest.raises(TaskError, match="let on_event return"):
                devices[0].start()
            events.append("stopped")

    with EdgeDevice.open(site.config("a"), on_event=stop_when_offline) as device:
        devices.append(device)
        device.start()
        until(lambda: "stopped" in events)
        device.stop()  # waits until the one of the callback is done
        assert "error" not in events
        device.start()
        with site.service() as running:
            assert running.wait().history[-1].merged == 1


def test_a_callback_may_close_and_all_files_are_closed_after_it(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a"], samples=5)
    devices: list[EdgeDevice] = []
    events: list[str] = []

    def close(event: DeviceEvent) -> None:
        events.append(event.kind)
        devices[0].close()

    device = EdgeDevice.open(site.config("a"), on_event=close)
    devices.append(device)
    device.start()
    until(lambda: device._released)
    assert events == ["offline"]
    EdgeDevice.open(site.config("a")).close()  # its lock is free


@pytest.mark.parametrize(
    "use",
    [
        EdgeDevice.status,
        EdgeDevice.start,
        EdgeDevice.pause,
        lambda device: device.record([0.0] * 4, 1),
        lambda device: device.has_recording("all"),
    ],
)
def test_a_closed_device_says_what_to_do(tmp_path: Path, use: Callable[[EdgeDevice], Any]) -> None:
    site = Site(tmp_path, ["a"], samples=5)
    device = EdgeDevice.open(site.config("a"))
    device.close()
    with pytest.raises(TaskError, match="open it again"):
        use(device)


def test_a_trainer_that_outlives_its_stop_takes_nothing_from_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_sdk.device._GRACE", 0.2)
    site = Site(tmp_path, ["a"], job={"rounds": 1})
    stepping, go_on = threading.Event(), threading.Event()
    with site.service() as running, EdgeDevice.open(site.config("a")) as device:
        monkeypatch.setattr(device, "_on_step", lambda *_: (stepping.set(), go_on.wait()))  # one long step
        device.start()
        first = device._present.trainer
        assert stepping.wait(20)
        device.stop()
        monkeypatch.undo()
        device.start()
        assert first.is_alive()
        go_on.set()
        until(lambda: not first.is_alive())
        assert device._present.trainer.is_alive()
        assert running.wait().history[-1].merged == 1


def test_a_second_process_on_one_store_is_refused(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a"])
    with EdgeDevice.open(site.config("a")):
        with pytest.raises(StorageError, match="another process uses this store"):
            EdgeDevice.open(site.config("a"))
        code = "import sys; from edge_sdk import EdgeDevice; EdgeDevice.open(sys.argv[1])"
        done = subprocess.run([sys.executable, "-c", code, site.config("a")], capture_output=True, text=True)
        assert "another process uses this store" in done.stderr


def test_an_update_that_ends_while_the_next_one_is_reported_is_not_offered_for_ever(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a"])
    with EdgeDevice.open(site.config("a")) as device:
        entries = [
            device._outbox.commit(task=task, number=1, program="p", body=b"x", feedback={}, sign=lambda draft: b"offer")
            for task in ("aa", "bb")
        ]
        device._report(talk.TaskDone(0.0, "bb"))  # from the thread that trains
        device._outbox.delete(entries[0].upload, "accepted")  # meanwhile, on the thread of the conversation
        while not device._events.empty():
            device._handle(device._events.get())
        assert [head.upload for head in device._state.queue] == [entries[1].upload]


def test_an_app_that_records_into_a_full_store_does_not_end_the_task(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a"], job={"rounds": 1, "task.steps": 800}, samples=60, limits={"sample_bytes": 60 * 24})
    events: list[DeviceEvent] = []
    x, y = tiny_data(12, seed=3)
    with site.service() as running, EdgeDevice.open(site.config("a"), on_event=events.append) as device:
        device.start()
        until(lambda: device.status().step > 5)
        for index in range(12):
            device.record(x[index], y[index], recording="all")
        assert device.status().task is not None  # it trained all the while
        assert running.wait().history[-1].merged == 1
    assert "declined" not in [event.kind for event in events]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("/a b/samples.sqlite: samples cannot be read (disk I/O error)", "samples cannot be read (disk I/O error)"),
        (
            "0 training samples, at least 1 needed: record more (program 'tiny/head/float')",
            "0 training samples, at least 1 needed: record more (program...",
        ),
    ],
)
def test_the_reason_of_a_declined_task_is_short_and_tells_no_path(text: str, reason: str) -> None:
    assert _reason(text) == reason
