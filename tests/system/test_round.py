"""A federated round from end to end: real broker, real devices, real gateway, in one process and in several."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from aggregator.service import MODEL_FILE, SUMMARY_FILE
from edge_sdk import DeviceEvent, EdgeDevice
from edge_sdk.tensors import unpack
from tests.system.site import Site, end, until
from tests.tiny_bundle import LORA, tiny_data


@pytest.mark.parametrize(
    "job",
    [
        {},
        {"program": LORA, "merge.rule": "product_svd", "rounds": 3},
        {"gate.enabled": False},
        {"task.encoding": "float32"},
        {"tls": True},
    ],
    ids=["head", "lora", "without a gate", "float32", "mutual TLS"],
)
def test_three_devices_learn_together(tmp_path: Path, job: dict) -> None:
    site = Site(
        tmp_path, ["a", "b", "c"], tls="tls" in job, job={key: value for key, value in job.items() if key != "tls"}
    )
    events: list[DeviceEvent] = []
    with ExitStack() as stack:
        running = stack.enter_context(site.service())
        devices = [stack.enter_context(EdgeDevice.open(site.config(name), on_event=events.append)) for name in site.ids]
        x, y = tiny_data(300, seed=99)
        before = (devices[0].predict(x).argmax(axis=1) == y).mean()
        for device in devices:
            device.start()
        status = running.wait()
        final = unpack((tmp_path / "state" / MODEL_FILE).read_bytes())[0]
        until(lambda: all(device.status().model == status.model for device in devices))
        after = [(device.predict(x).argmax(axis=1) == y).mean() for device in devices]
        counts = [device.status() for device in devices]
    rounds = job.get("rounds", 2)
    evaluates = job.get("gate.enabled", True)
    assert status.state == "done"
    assert (status.duplicated, status.pending, status.set_aside, status.refused) == (0, 0, {}, {})
    assert status.merged == status.accepted == 3 * (rounds + (rounds + 1 if evaluates else 0))
    assert (status.trained, status.measured) == (3 * rounds, status.merged - 3 * rounds)
    assert after[0] > before + 0.2
    assert after == [after[0]] * 3
    assert {event.kind for event in events} >= {"online", "task_done", "update_accepted", "model_changed"}
    assert all(np.isfinite(value).all() for value in final.values())
    summary = json.loads((tmp_path / "state" / SUMMARY_FILE).read_text())
    assert [record["outcome"] for record in summary["history"] if record["round"]] == ["accepted"] * rounds
    assert [count.updates_accepted for count in counts] == [count.updates_made for count in counts]


def test_a_job_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a", "b"], job={"rounds": 4})
    with ExitStack() as stack:
        for name in site.ids:
            stack.enter_context(EdgeDevice.open(site.config(name))).start()
        with site.service() as running:
            until(lambda: site.status().round >= 2)
            running.service.stop()
            assert running.wait().state == "stopped"
        assert site.status().state == "stopped"
        with site.service() as running:
            status = running.wait()
    assert status.state == "done"
    assert [record.outcome for record in status.history][1:] == ["accepted"] * 4
    assert (status.merged, status.duplicated) == (2 * 9, 0)


def test_a_model_that_is_worse_is_rolled_back_and_the_reason_is_recorded(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a", "b"], job={"rounds": 3, "task.steps": 60})
    with ExitStack() as stack:
        running = stack.enter_context(site.service())
        for name in site.ids:
            stack.enter_context(EdgeDevice.open(site.config(name))).start()
        until(lambda: site.status().round >= 2)
        running.service.stop()
        running.wait()
        good = site.status().history[1]
        assert good.outcome == "accepted"
        # The rest of the job trains with a rate that destroys the model.
        ruin = {"task.learning_rate": 9.9, "task.hyper": {"weight_decay": 0.2}, "limits.norm": 1e6}
        site.write_job({"rounds": 3, "task.steps": 60, **ruin})
        with site.service() as again:
            status = again.wait()
    record = status.history[-1]
    assert record.outcome == "rolled_back"
    assert "worse by" in record.reason
    assert record.model == record.start
    assert status.model == record.start


def test_a_device_without_samples_declines_and_the_others_go_on(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a", "b"], job={"rounds": 1})
    (tmp_path / "b" / "store" / "samples.sqlite").unlink()
    with ExitStack() as stack:
        running = stack.enter_context(site.service())
        for name in site.ids:
            stack.enter_context(EdgeDevice.open(site.config(name))).start()
        status = running.wait()
    assert status.history[-1].merged == 1
    assert "at least 1 needed" in status.history[-1].declined["b"]


def test_a_job_whose_devices_have_no_samples_yet_waits_for_them_without_using_up_its_rounds(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a"], job={"rounds": 1, "round.deadline_seconds": 20}, samples=1)
    (tmp_path / "a" / "store" / "samples.sqlite").unlink()
    with site.service() as running, EdgeDevice.open(site.config("a")) as device:
        device.start()
        until(lambda: site.status().uncounted)
        x, y = tiny_data(60)
        device.record_many(x, y, recording="first")
        status = running.wait()
    assert status.history[-1].outcome == "accepted"
    assert {record.outcome for record in status.history[1:-1]} == {"empty"}
    assert "at least 1 needed" in status.history[1].reason
    assert "at least 1 needed" in status.history[1].declined["a"]
    assert all((record.seconds or 0.0) < 10 for record in status.history[1:-1])
    assert status.history[-1].score_before is not None


@pytest.mark.parametrize("optimizer", ["none", "adam"])
def test_the_gateway_keeps_the_models_it_needs_and_no_others(tmp_path: Path, optimizer: str) -> None:
    site = Site(
        tmp_path, ["a"], job={"rounds": 8, "merge.server": {"optimizer": optimizer}, "task.encoding": "float32"}
    )
    most = 0
    with site.service() as running, EdgeDevice.open(site.config("a")) as device:
        device.start()

        def over() -> bool:
            nonlocal most
            most = max(most, len(list((tmp_path / "state").glob("blobs/*"))))
            return running.result is not None or running.error is not None

        until(over, 60)
        status = running.wait()
    assert status.state == "done"
    assert most <= 5  # a model, a candidate, the moments of both, and one that is being written


def test_a_better_model_is_accepted_after_the_data_have_changed(tmp_path: Path) -> None:
    job = {"rounds": 12, "task.steps": 60, "task.learning_rate": 0.02, "limits.norm": 1000.0}
    site = Site(tmp_path, ["a"], job=job, samples=200)
    with site.service() as running, EdgeDevice.open(site.config("a")) as device:
        device.start()
        until(lambda: site.status().round >= 4)
        x, y = tiny_data(2000, seed=77)
        noise = np.random.default_rng(1)
        changed = np.where(noise.random(len(y)) < 0.15, noise.integers(0, 3, len(y)), (y + 1) % 3)
        device.record_many(x, changed, recording="after")
        status = running.wait()
    outcomes = [record.outcome for record in status.history]
    change = outcomes.index("rolled_back")
    assert "accepted" in outcomes[change + 1 :]
    measured = status.history[change + 1]
    assert measured.score_before is not None
    assert (status.history[change].score_before or 0.0) > measured.score_before + 0.1


def test_processes_of_their_own_do_the_same_and_the_command_ends_with_0(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a", "b"])
    gateway = site.gateway_process()
    devices = [site.device_process(name) for name in site.ids]
    try:
        assert gateway.wait(60) == 0, (tmp_path / "gateway.log").read_text()
    finally:
        for process in (gateway, *devices):
            end(process)
    assert site.status().state == "done"
    assert site.status().merged == 10
    assert [process.returncode for process in devices] == [0, 0]
