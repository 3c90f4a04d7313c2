"""Two real devices of different speed: one trains quantization-aware, the other does not, and a killed gateway knows why."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from aggregator.broker import Broker
from aggregator.job import BrokerSettings
from edge_sdk import EdgeDevice
from edge_sdk.cli import main
from export import ProgramSpec, build_bundle
from tests.system.site import Site, end, free_port, until
from tests.tiny_bundle import CLASSES, tiny_data

FEATURES = 512
PTQ, QAT = "tiny/full/ptq4", "tiny/full/qat4"
ROUNDS = 4


def two_programs(path: Path) -> None:
    """One wide layer: to quantize 512 activations of a sample costs four times what the step does with them."""
    net = nn.Linear(FEATURES, CLASSES)
    programs = [ProgramSpec("full", {}, precision, "sgd") for precision in ("ptq4", "qat4")]
    build_bundle(net, tiny_data(8, features=FEATURES), path, name="tiny", loss="cross_entropy", programs=programs)


@pytest.mark.faults
def test_devices_of_different_speed_train_different_programs_and_a_killed_gateway_goes_on_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    broker = Broker(tmp_path / "broker", BrokerSettings(url=None, port=port), kind="mosquitto")
    job = {
        "program": PTQ,
        "gate.enabled": False,
        "rounds": ROUNDS,
        "task.steps": 30,
        "task.batch_size": 4000,
        "task.learning_rate": 0.01,
        "assign.rule": "precision",
        "assign.precision": {
            "programs": {"ptq": PTQ, "qat": QAT},
            "time_factor": 1.0,  # only what costs a round no time
            "drop": 0.05,
            "final_qat": 0.0,
        },
    }
    site = Site(
        tmp_path,
        ["fast", "slow"],
        job=job,
        features=FEATURES,
        samples=20,
        broker=f"mqtt://127.0.0.1:{port}",
        make_bundle=two_programs,
    )
    with EdgeDevice.open(site.config("slow")) as device:  # its batches are two hundred times larger
        x, y = tiny_data(5000, features=FEATURES, seed=5)
        device.record_many(x, y, recording="more")
    with ExitStack() as stack:
        stack.callback(broker.stop)
        broker.start()
        gateway = site.gateway_process()
        stack.callback(lambda: end(gateway))
        for name in site.ids:
            stack.enter_context(EdgeDevice.open(site.config(name))).start()
        until(lambda: site.status().round >= 3, 60)
        gateway.send_signal(signal.SIGKILL)
        assert gateway.wait() == -signal.SIGKILL
        again = site.gateway_process()
        stack.callback(lambda: end(again))
        assert again.wait(60) == 0, (tmp_path / "gateway.log").read_text()
    status = site.status()
    rounds = [dict(record.programs) for record in status.history]
    programs = [{name: entry[0] for name, entry in told.items()} for told in rounds]
    assert programs[:2] == [{"fast": PTQ, "slow": PTQ}, {"fast": QAT, "slow": QAT}]  # nothing is known; measured once
    assert [told["slow"] for told in programs[2:]] == [PTQ] * (ROUNDS - 2)  # and not again after the kill
    assert programs[-1]["fast"] == QAT
    reasons = {name: entry[1] for name, entry in rounds[-1].items()}
    assert reasons["fast"].startswith("free: ")
    assert reasons["slow"].startswith("too-slow: a round would take it ")
    assert [record.merged for record in status.history] == [2] * ROUNDS
    assert np.isfinite([record.metrics["step_ms"] for record in status.history]).all()
    assert main(["job", "status", str(site.job)]) == 0
    assert f"slow trains {PTQ}: too-slow: " in capsys.readouterr().out
