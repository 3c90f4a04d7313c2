"""Updates under kills: Edgewise beside plain MQTT clients with QoS 1 and with QoS 2.

Three devices make updates of about 64 KiB and send them to one receiver over one mosquitto, all of them processes of their own.
Devices, receiver and broker are killed with SIGKILL again and again, drawn from one seed for all three systems, and started
again after at most half a second.

The plain clients are as careful as a client with nothing but MQTT can be: persistent sessions, one message at a time, and an
application that remembers on disk, and flushes, which message was acknowledged last; after a restart it sends the next one again.
Their receiver writes what comes to disk, and flushes, before the message is acknowledged.

Lost: made and never merged, set aside or refused with a reason (plain: never received). Duplicated: counted more than once.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from subprocess import Popen
from typing import Any, Protocol

from aggregator.broker import Broker
from aggregator.job import BrokerSettings
from benchmarks.plant import BROKER, GATEWAY, Plant, chunked_site
from benchmarks.report import CheckFailed, Report, main, parser, table
from benchmarks.site import end, spawn

DEVICES = ("a", "b", "c")
WEIGHTS: Mapping[str, float] = {**dict.fromkeys(DEVICES, 0.22), GATEWAY: 0.22, BROKER: 0.12}
REST_SECONDS = 0.5  # at most, before a process that was killed is started again
BODY_BYTES = 64_000
SETTLE_SECONDS = 60.0
COLUMNS = {
    "system": "system",
    "kills": "kills",
    "updates": "updates",
    "merged_once": "once",
    "refused": "refused",
    "lost": "lost",
    "duplicated": "twice",
    "seconds": "s",
}

_SENDER = """
import os, sys, time
import paho.mqtt.client as mqtt
name, port, qos, folder, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
def read(path):
    try:
        return int(open(path).read())
    except (OSError, ValueError):
        return 0
def keep(path, number):
    with open(path + ".part", "w") as file:
        file.write(str(number)); file.flush(); os.fsync(file.fileno())
    os.replace(path + ".part", path)
made, done = (os.path.join(folder, f"{name}.{kind}") for kind in ("made", "done"))
client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, name, clean_session=False)
client.reconnect_delay_set(1, 2)
while True:
    try:
        client.connect("127.0.0.1", port)
        break
    except OSError:
        time.sleep(0.1)
client.loop_start()
while True:
    number = read(done) + 1
    keep(made, number)
    info = client.publish(f"updates/{name}", str(number).encode().ljust(size), qos)
    while not info.is_published():
        try:
            info.wait_for_publish(0.2)
        except (ValueError, RuntimeError):
            time.sleep(0.1)
    keep(done, number)
"""
_RECEIVER = """
import os, sys, time
import paho.mqtt.client as mqtt
port, qos, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
sink = open(os.path.join(folder, "received"), "ab")
def took(client, data, message):
    sink.write(f"{message.topic.split('/')[1]} {int(message.payload)}\\n".encode()); sink.flush(); os.fsync(sink.fileno())
client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, "receiver", clean_session=False)
client.on_connect = lambda client, *_: client.subscribe("updates/#", qos)
client.on_message = took
client.reconnect_delay_set(1, 2)
while True:
    try:
        client.connect("127.0.0.1", port)
        break
    except OSError:
        time.sleep(0.1)
client.loop_forever()
"""


class Killable(Protocol):
    """A set of processes that can be killed and started by name."""

    processes: dict[str, Popen[bytes]]

    def start(self, name: str) -> None:
        """Start a process."""

    def kill(self, name: str) -> bool:
        """SIGKILL; False if it does not run."""


class PlainPlant:
    """Three senders and a receiver that trust MQTT alone; what they made and received stands in `folder`."""

    def __init__(self, folder: Path, qos: int) -> None:
        self.folder, self.qos = folder, qos
        self.processes: dict[str, Popen[bytes]] = {}
        self._broker = Broker(folder / "broker", BrokerSettings(url=None, port=0), kind="mosquitto")
        self._port = int(self._broker.start().rpartition(":")[2])

    def start(self, name: str) -> None:
        arguments = ["-c", _RECEIVER, str(self._port), str(self.qos), str(self.folder)]
        if name != GATEWAY:
            rest = [str(self._port), str(self.qos), str(self.folder), str(BODY_BYTES)]
            arguments = ["-c", _SENDER, name, *rest]
        self.processes[name] = spawn(arguments, self.folder / f"{name}.log", {})

    def kill(self, name: str) -> bool:
        if name == BROKER:
            pid = self._broker.pid
            if pid is None or not Path(f"/proc/{pid}").exists():
                return False
            os.kill(pid, signal.SIGKILL)
            return True
        process = self.processes[name]
        if process.poll() is not None:
            return False
        process.kill()
        process.wait()
        return True

    def made(self) -> int:
        """How many updates were begun."""
        paths = [self.folder / f"{name}.made" for name in DEVICES]
        return sum(int(path.read_text()) for path in paths if path.exists())

    def received(self) -> Counter[str]:
        """How often each update was received."""
        path = self.folder / "received"
        return Counter(path.read_text().splitlines() if path.exists() else [])

    def close(self) -> None:
        for process in self.processes.values():
            end(process)
        self._broker.stop()


def batter(
    plant: Killable, kills: int, seconds: float, draw: random.Random, is_done: Callable[[], bool]
) -> Counter[str]:
    """Kill until there were `kills` and `is_done`, every `seconds` in the mean; returns who was killed how often."""
    killed: Counter[str] = Counter()
    restart_at: dict[str, float] = {}
    while killed.total() < kills or not is_done():
        victim = draw.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        pause, rest = min(draw.expovariate(1 / seconds), 3 * seconds), draw.uniform(0, REST_SECONDS)
        until = time.monotonic() + pause
        while time.monotonic() < until or (killed.total() >= kills and restart_at):
            for name in [name for name, at in restart_at.items() if time.monotonic() >= at]:
                plant.start(name)
                del restart_at[name]
            time.sleep(0.02)
        if killed.total() < kills and victim not in restart_at and plant.kill(victim):
            killed[victim] += 1
            if victim != BROKER:
                restart_at[victim] = time.monotonic() + rest
        for name, process in plant.processes.items():
            # The gateway gives up when its broker has died five times within a minute.
            if name == GATEWAY and name not in restart_at and process.poll() is not None:
                restart_at[name] = time.monotonic() + rest
    for name in restart_at:
        plant.start(name)
    return killed


def edgewise_row(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Edgewise, at least `args.updates` updates under `args.kills` kills."""
    began = time.monotonic()
    site = chunked_site(folder, list(DEVICES), chunks=1, **{"rounds": 100_000, "round.deadline_seconds": 20})
    with Plant(site) as plant:
        for name in (GATEWAY, *DEVICES):
            plant.start(name)

        def made() -> int:
            return sum(_outbox_count(site.folder / name, "made") for name in DEVICES)

        seconds = args.mean_seconds
        killed = batter(plant, args.kills, seconds, random.Random(args.seed), lambda: made() >= args.updates)
        site.change_job(rounds=site.status().round + 1)
        plant.kill(GATEWAY)
        plant.start(GATEWAY)
        plant.finish(SETTLE_SECONDS + 60)
    status = site.status()
    total, refused = made(), sum(status.refused.values())
    with closing(sqlite3.connect(site.folder / "state" / "journal.sqlite")) as db:
        counted = db.execute(
            "SELECT count(*), count(merged_in), count(set_aside), count(DISTINCT device || outbox_id || seq) FROM ledger"
        ).fetchone()
    rows, merged, aside, distinct = map(int, counted)
    return {
        "system": "edgewise",
        "kills": killed.total(),
        "killed": dict(killed),
        "updates": total,
        "merged_once": merged,
        "set_aside": aside,
        "refused": refused,
        "lost": total - distinct - refused,
        "duplicated": rows - distinct + status.duplicated,
        "seconds": round(time.monotonic() - began, 1),
    }


def plain_row(folder: Path, qos: int, args: argparse.Namespace) -> dict[str, Any]:
    """Plain MQTT with this quality of service, at least as many updates under as many kills."""
    began = time.monotonic()
    plant = PlainPlant(folder, qos)
    try:
        for name in (GATEWAY, *DEVICES):
            plant.start(name)
        draw = random.Random(args.seed)
        killed = batter(plant, args.kills, args.mean_seconds, draw, lambda: plant.made() >= args.updates)
        for name in DEVICES:  # the senders stop where they are; what was acknowledged must arrive
            end(plant.processes[name])
        done = {name: int((folder / f"{name}.done").read_text()) for name in DEVICES}
        until, seen = time.monotonic() + SETTLE_SECONDS, -1
        while time.monotonic() < until and seen != (seen := len(plant.received())):
            time.sleep(3)
        received = plant.received()
    finally:
        plant.close()
    acknowledged = {f"{name} {number}" for name in DEVICES for number in range(1, done[name] + 1)}
    return {
        "system": f"MQTT QoS {qos}",
        "kills": killed.total(),
        "killed": dict(killed),
        "updates": len(acknowledged),
        "merged_once": sum(received[name] == 1 for name in acknowledged),
        "set_aside": 0,
        "refused": 0,
        "lost": len(acknowledged - set(received)),
        "duplicated": sum(count - 1 for count in received.values()),
        "seconds": round(time.monotonic() - began, 1),
    }


def _outbox_count(device: Path, name: str) -> int:
    path = device / "store" / "outbox.sqlite"
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=10)) as db:
        row = db.execute("SELECT value FROM meta WHERE key=?", (f"count.{name}",)).fetchone()
    return int(row[0]) if row else 0


def measure(args: argparse.Namespace) -> Report:
    """One row per system."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="edgewise-chaos-") as name:
        Path(name).chmod(0o755)
        runs: list[Callable[[Path], dict[str, Any]]] = [
            lambda folder: edgewise_row(folder, args),
            lambda folder: plain_row(folder, 1, args),
            lambda folder: plain_row(folder, 2, args),
        ]
        for number, run in enumerate(runs):
            folder = Path(name) / str(number)
            folder.mkdir()
            rows.append(run(folder))
            print(table(rows[-1:], COLUMNS).splitlines()[1], file=sys.stderr, flush=True)
    ours, one, two = rows
    summary = {
        "updates": ours["updates"],
        "kills": ours["kills"],
        "lost": ours["lost"],
        "duplicated": ours["duplicated"],
        **{f"qos1_{key}": one[key] for key in ("updates", "kills", "lost", "duplicated")},
        **{f"qos2_{key}": two[key] for key in ("updates", "kills", "lost", "duplicated")},
        "seed": args.seed,
    }
    if args.check and (ours["lost"] or ours["duplicated"]):
        raise CheckFailed(f"{ours['lost']} updates lost, {ours['duplicated']} counted twice, of {ours['updates']}")
    return Report(rows, summary)


def show(report: Report) -> str:
    """The table."""
    return table(report.rows, COLUMNS)


def _arguments() -> argparse.ArgumentParser:
    result = parser("chaos", __doc__)
    result.add_argument("--updates", type=int, default=500, help="at least so many updates of each system (500)")
    result.add_argument("--kills", type=int, default=100, help="kills of each system (100)")
    result.add_argument("--mean-seconds", type=float, default=1.0, help="between two kills (1.0)")
    result.add_argument("--seed", type=int, default=20260112, help="who is killed when")
    result.add_argument("--check", action="store_true", help="end with 5 if Edgewise lost or duplicated anything")
    return result


if __name__ == "__main__":
    sys.exit(main(measure, show, _arguments()))
