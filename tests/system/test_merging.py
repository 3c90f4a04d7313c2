"""Merging from end to end: several ranks in one round, factors in turn, side terms, server optimizers, a device's choice."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from aggregator.journal import Status
from aggregator.service import MODEL_FILE
from edge_sdk import EdgeDevice
from edge_sdk.bundle import Bundle
from edge_sdk.cli import main
from edge_sdk.tensors import unpack
from edge_sdk.update import max_update_bytes
from export import ProgramSpec, build_bundle
from tests.system.site import Site
from tests.tiny_bundle import CLASSES, tiny_data

FEATURES = 12


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of rank 1, 2 and 4 named by rank, with side terms, and both halves of a pair of rank 2."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(FEATURES, 10), nn.Tanh(), nn.Linear(10, CLASSES))
    x, y = tiny_data(40, features=FEATURES)
    mixed = [{"rank": rank, "named_by_rank": True, "side_rank": 6} for rank in (1, 2, 4)]
    halves = [{"rank": 2, "factors": factors, "side_rank": 6} for factors in ("a", "b")]
    programs = [ProgramSpec("lora", options, "float", "sgd") for options in (*mixed, *halves)]
    path = tmp_path_factory.mktemp("merging") / "net.bundle"
    build_bundle(module, (x, y), path, name="net", loss="cross_entropy", programs=programs)
    return path


def run(tmp_path: Path, bundle: Path, job: Mapping[str, Any]) -> tuple[Site, Status, float, float]:
    """A job of three devices; its accuracy before and after, as a device predicts."""
    site = Site(tmp_path, ["a", "b", "c"], features=FEATURES)
    site.bundle.write_bytes(bundle.read_bytes())
    site.write_job({"rounds": 3, "task.steps": 30, "task.learning_rate": 0.05, **job})
    x, y = tiny_data(300, features=FEATURES, seed=99)
    with ExitStack() as stack:
        running = stack.enter_context(site.service())
        devices = [stack.enter_context(EdgeDevice.open(site.config(name))) for name in site.ids]
        before = (devices[0].predict(x).argmax(axis=1) == y).mean()
        for device in devices:
            device.start()
        status = running.wait(120)
    with EdgeDevice.open(site.config("b")) as device:
        after = (device.predict(x).argmax(axis=1) == y).mean()
    assert (status.state, status.refused, status.duplicated) == ("done", {}, 0)
    return site, status, float(before), float(after)


RANK = "net/lora/r{}/float"


@pytest.mark.parametrize("rule", ["product_svd", "rank_partition", "stack"])
def test_devices_of_ranks_one_two_and_four_learn_in_one_round(tmp_path: Path, bundle: Path, rule: str) -> None:
    job = {
        "program": RANK.format(4),
        "merge.rule": rule,
        "assign.programs": {"a": RANK.format(1), "b": RANK.format(2)},
    }
    site, status, before, after = run(tmp_path, bundle, job)
    assert after > before + 0.15
    with Bundle.open(site.bundle) as opened:
        limits = {
            d: max_update_bytes(opened.program(RANK.format(r)), opened.tensors)
            for d, r in zip("abc", (1, 2, 4), strict=True)
        }
        model = unpack((tmp_path / "state" / MODEL_FILE).read_bytes())[0]
        assert set(model) == set(opened.program(RANK.format(4)).reads)
    for record in status.history[1:]:
        assert record.merged == 3
        assert record.score_after is not None
        assert all(0 < record.traffic[device][0] < limits[device] + 60_000 for device in "abc")
        assert set(record.merge["layers"]) == {"0", "2"}
    if rule == "stack":
        assert all(layer["truncation_error"] < 1e-6 for layer in status.history[-1].merge["layers"].values())


def test_factors_that_take_turns_halve_what_travels_up(
    tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    halves = ["net/lora/r2/b/float", "net/lora/r2/a/float"]
    job = {"program": halves[0], "assign.cycle": halves, "merge.rule": "alternate", "rounds": 4}
    _, status, before, after = run(tmp_path, bundle, job)
    assert after > before + 0.1
    assert [record.merge["rule"] for record in status.history[1:]] == ["alternate"] * 4


def test_the_commands_show_the_layers_of_the_last_merge_and_what_lasted_too_long(
    tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = {"program": RANK.format(2), "merge.rule": "product_svd", "merge.lora": {"rank": 1}}
    site, status, *_ = run(tmp_path, bundle, job)
    assert main(["job", "status", str(site.job)]) == 0
    assert "ALARM truncation_high" in capsys.readouterr().out
    assert [(alarm.kind, alarm.device, alarm.count) for alarm in status.alarms] == [("truncation_high", "", 1)]
    assert main(["job", "rounds", str(site.job)]) == 0
    shown = capsys.readouterr().out
    assert "layers of round 3 (product_svd):" in shown
    layer = status.history[-1].merge["layers"]["0"]
    assert f"{layer['truncation_error']:.3g}" in shown


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "yogi"])
def test_a_server_optimizer_carries_its_moments_from_round_to_round(
    tmp_path: Path, bundle: Path, optimizer: str
) -> None:
    job = {
        "program": RANK.format(2),
        "merge.rule": "factor_mean",
        "merge.server": {"optimizer": optimizer, "learning_rate": 0.5 if optimizer == "momentum" else 0.1},
        "gate.tolerance": 1.0,
    }
    _, status, *_ = run(tmp_path, bundle, job)
    moments = [record.merge["moments"] for record in status.history[1:]]
    assert len(set(moments)) == 3
    assert all(moments)
    assert (tmp_path / "state" / "blobs" / moments[-1]).is_file()


def test_a_device_may_choose_a_smaller_encoding_where_the_task_lets_it(tmp_path: Path, bundle: Path) -> None:
    config = 'encoding = "int4_row"\n'
    site = Site(tmp_path, ["a", "b", "c"], features=FEATURES)
    site.bundle.write_bytes(bundle.read_bytes())
    for name in site.ids:
        path = site.config(name)
        path.write_text(config + path.read_text())
    site.write_job(
        {
            "program": RANK.format(4),
            "rounds": 1,
            "task.encoding": "float32",
            "task.encodings_allowed": ["int4_row"],
            "journal.keep_updates": True,
        }
    )
    with ExitStack() as stack:
        running = stack.enter_context(site.service())
        for name in site.ids:
            stack.enter_context(EdgeDevice.open(site.config(name))).start()
        status = running.wait(60)
    assert status.merged == 9  # two evaluations and one training of three devices
    import sqlite3

    with sqlite3.connect(tmp_path / "state" / "journal.sqlite") as journal:
        sizes = [row[0] for row in journal.execute("SELECT size FROM ledger WHERE phase='train'")]
    with Bundle.open(site.bundle) as opened:
        numbers = sum(int(np.prod(opened.tensors[n].shape)) for n in opened.program(RANK.format(4)).tensors)
    assert max(sizes) < 4 * numbers  # header and all
