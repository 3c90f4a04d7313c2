"""The demo's own federation, on the watch data, while its devices, its gateway and its broker are killed at random."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from pathlib import Path

import pytest

from examples import datasets
from examples.demo import Options
from examples.federation import Federation, Site
from examples.watch_model import train_centrally
from tests.environments import python_of

SEED = 20260112
KILLS = 24
ROUNDS = 6


@pytest.mark.faults
def test_every_update_is_merged_exactly_once_whatever_dies(tmp_path: Path) -> None:
    options = Options(seed=SEED, rounds=ROUNDS, steps=20, folder=tmp_path, device_python=python_of(".venv-device"))
    recordings = datasets.watch()
    x, y = datasets.of_people(recordings, options.base)
    x_test, y_test = datasets.of_people(recordings, options.test)
    net = train_centrally(x, y, normalise_by=x, steps=150, seed=SEED)
    site = Site.prepare(tmp_path, options, net, recordings)
    draw = random.Random(SEED)
    killed: Counter[str] = Counter()
    with Federation(site, options) as federation:
        while killed.total() < KILLS or len(killed) < 3:
            time.sleep(min(draw.expovariate(1 / 0.5), 1.5))
            kind = draw.choices(["device", "gateway", "broker"], [0.6, 0.25, 0.15])[0]
            if federation.status().round >= ROUNDS:
                break  # the last round is left in peace, so that every device can hear its verdicts
            killed[kind] += kill_and_start(federation, kind, draw)
        federation.run(show=False)
        facts = federation.facts()
    print(dict(killed), facts.updates_sent, "updates")
    assert set(killed) == {"device", "gateway", "broker"}
    assert killed.total() >= 10
    assert (
        facts.updates_sent == facts.updates_merged == 6 * (2 * ROUNDS + 1)
    )  # trained and measured, and the start measured
    assert (facts.lost, facts.duplicated) == (0, 0)
    with contextlib.closing(sqlite3.connect(tmp_path / "gateway" / "journal.sqlite")) as journal:
        trained = journal.execute("SELECT merged_in, count(*) FROM ledger WHERE phase='train' GROUP BY 1").fetchall()
        records = [json.loads(row[0]) for row in journal.execute("SELECT record FROM round ORDER BY round")]
    assert trained == [(number, 6) for number in range(1, ROUNDS + 1)]
    assert [record["merge"]["updates"] for record in records if record["merge"]] == [6] * ROUNDS
    assert site.accuracy_of(facts.model, x_test, y_test) > site.accuracy_of(None, x_test, y_test)


def kill_and_start(federation: Federation, kind: str, draw: random.Random) -> int:
    """SIGKILL one process and start it again, the broker's by the gateway; how many were killed."""
    if kind == "broker":
        mark = federation.site.folder / "gateway" / "broker" / "broker.pid"
        try:
            pid = int(json.loads(mark.read_text())["pid"])
            os.kill(pid, signal.SIGKILL)
        except (OSError, ValueError):
            return 0  # it is just being started
        return 1
    name = draw.choice(list(federation.devices)) if kind == "device" else ""
    process = federation.gateway if kind == "gateway" else federation.devices[name]
    assert process is not None
    assert process.poll() is None, f"{name or kind} ended by itself"
    process.kill()
    process.wait()
    time.sleep(draw.uniform(0, 0.5))
    if kind == "gateway":
        federation.start_gateway()
    else:
        federation.start_device(name)
    return 1
