"""A federation on one machine: a gateway process, its broker, and one process per device, each with a folder of its own.

`Site` is what lies on disk before anything runs (bundle, keys, registry, job file, every person's data); `Federation`
starts the processes, shows how they get on, and ends them whatever happens.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from aggregator.job import load_job
from aggregator.journal import RoundRecord, Status, read_status
from aggregator.service import MODEL_FILE
from devices.cli import make_keys
from devices.registry import Entry, Registry
from edge_sdk.bundle import Bundle
from edge_sdk.errors import EdgewiseError
from edge_sdk.keys import SigningKey
from edge_sdk.tensors import unpack
from examples import datasets
from examples.controls import score
from export.build import ProgramSpec, build_bundle

if TYPE_CHECKING:
    from examples.demo import Options
    from examples.watch_model import WatchNet

CHECKOUT = Path(__file__).resolve().parent.parent
EXAMPLE_SAMPLES = 64
ROUND_SECONDS = 60
START_SECONDS = 30.0
STOP_SECONDS = 10.0
LOOK_SECONDS = 0.5
BASE_INSTALL = ("numpy", "onnxruntime", "paho.mqtt.client", "safetensors", "cryptography")
SIGNATURES = "cryptography.hazmat.primitives.asymmetric.ed25519"  # all that a device uses of its package


class FederationError(EdgewiseError):
    """A process of the federation did not do what it should."""

    exit_code = 4


@dataclass(frozen=True)
class Facts:
    """What the journal and the devices' own reports say at the end."""

    model: Path
    rounds: int
    broker: str
    updates_sent: int
    updates_merged: int
    trained: int
    measured: int
    lost: int
    duplicated: int
    devices: list[dict[str, Any]]


@dataclass(frozen=True)
class Site:
    """The files of one federation; `proof` is what the exporter says of its step graph."""

    folder: Path
    bundle: Path
    program: str
    proof: str
    device_ids: tuple[str, ...]
    device_python: Path

    @classmethod
    def prepare(cls, folder: Path, options: Options, net: WatchNet, recordings: Sequence[datasets.Recording]) -> Self:
        """Export `net` and write everything that gateway and devices need."""
        x, y = datasets.of_people(recordings, options.base)
        some = np.random.default_rng(options.seed).permutation(len(x))[:EXAMPLE_SAMPLES]
        adapters = {"rank": options.rank, "alpha": options.alpha} if options.scope == "lora" else {}
        report = build_bundle(
            net,
            (x[some], y[some]),
            folder / "watch.bundle",
            name="watch",
            loss="cross_entropy",
            programs=[ProgramSpec(options.scope, adapters, batch=options.batch)],
            classes=datasets.WATCH_CLASSES,
            seed=options.seed,
        )
        program = report.programs[0]
        proof = (
            f"{program.parameters} trained parameters, gradients within {program.proof.max_relative_error:.0e} "
            f"of {program.proof.oracle}'s"
        )
        ids = tuple(f"person-{person:02d}" for person in options.devices)
        site = cls(folder, report.path, program.id, proof, ids, options.device_python)
        make_keys(folder / "keys")
        registry = Registry()
        for person, device in zip(options.devices, ids, strict=True):
            (folder / device).mkdir()
            key = SigningKey.generate(folder / device / "device.key")
            registry.add(Entry(device, key.verify_key.text))
            mine = [recording for recording in recordings if recording.person == person]
            site.data_of(device).mkdir()
            for recording in mine:
                np.save(site.data_of(device) / f"{recording.name}_{recording.label}.npy", recording.x)
        registry.save(folder / "devices.json")
        site.job.write_text(site._job_text(options))
        return site

    @property
    def job(self) -> Path:
        """The gateway's job file."""
        return self.folder / "job.toml"

    def data_of(self, device: str) -> Path:
        """What one person's watch recorded: a file per recording, `<name>_<label>.npy`."""
        return self.folder / device / "recordings"

    def report_of(self, device: str) -> Path:
        """What one device process writes about itself."""
        return self.folder / device / "report.json"

    def config_of(self, device: str) -> Path:
        """A device's own settings."""
        return self.folder / device / "device.toml"

    def write_device(self, device: str, broker: str) -> None:
        """Write a device's own settings, once it is known where the broker listens."""
        values = {
            "id": device,
            "site": "clinic",
            "job": "watch",
            "broker": broker,
            "bundle": f"../{self.bundle.name}",
            "store": "store",
            "device_key": "device.key",
            "control_key": "../keys/control.pub",
        }
        lines = [f"{name} = {json.dumps(value)}\n" for name, value in values.items()]
        self.config_of(device).write_text("".join(lines))

    def accuracy_of(self, model: Path | None, x: np.ndarray, y: np.ndarray) -> float:
        """The share of windows named rightly by a merged model, or by the bundle's own tensors."""
        with Bundle.open(self.bundle) as bundle:
            program = bundle.program(self.program)
            tensors = bundle.initial(program) if model is None else unpack(model.read_bytes())[0]
            return score(bundle, self.program, tensors, x, y)

    def import_only_rss_mb(self, *modules: str) -> float:
        """The peak of a process, with the devices' Python, that imports modules and does nothing."""
        code = f"import {', '.join(modules)}; print(open('/proc/self/status').read())"
        told = subprocess.run([self.device_python, "-c", code], capture_output=True, text=True, check=True).stdout
        return next(int(line.split()[1]) * 1024 / 1e6 for line in told.splitlines() if line.startswith("VmHWM:"))

    def _job_text(self, options: Options) -> str:
        return f"""site = "clinic"
job = "watch"
bundle = "{self.bundle.name}"
program = "{self.program}"
rounds = {options.rounds}
seed = {options.seed}
state = "gateway"

[keys]
control = "keys/control.key"

[devices]
registry = "devices.json"

[round]
devices_wait = {len(self.device_ids)}
deadline_seconds = {ROUND_SECONDS}

[task]
steps = {options.steps}
batch_size = {options.batch}
learning_rate = {options.learning_rate}
schedule = "linear"
encoding = "{options.encoding}"

[merge]
rule = "{options.merge}"
"""


class Federation:
    """The running processes. On leaving, all of them are ended, devices first."""

    def __init__(self, site: Site, options: Options) -> None:
        self.site, self._options = site, options
        self.gateway: subprocess.Popen[bytes] | None = None
        self.devices: dict[str, subprocess.Popen[bytes]] = {}
        self.broker_description = ""

    def __enter__(self) -> Self:
        try:
            self.start_gateway()
            broker = self._wait_for_broker()
            for device in self.site.device_ids:
                self.site.write_device(device, broker)
                self.start_device(device)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, *, show: bool) -> None:
        """Watch until the job is done. Raises `FederationError` naming the process that ended too early."""
        table = LiveTable() if show else None
        assert self.gateway is not None
        while (code := self.gateway.poll()) is None:
            for device, process in self.devices.items():
                if process.poll() is not None:
                    raise FederationError(
                        f"device {device} ended with {process.returncode}: {self._last_words(device)}"
                    )
            if table is not None:
                table.show(self.status())
            time.sleep(LOOK_SECONDS)
        if table is not None:
            table.show(self.status())
            table.close()
        if code != 0:
            raise FederationError(f"the gateway ended with {code}: {self._last_words('gateway')}")

    def status(self) -> Status:
        """Where the job stands, as `edgewise job status` tells it."""
        return read_status(load_job(self.site.job))

    def facts(self) -> Facts:
        """End the devices and gather what journal and reports say."""
        self._end_devices()
        status = self.status()
        reports = {device: json.loads(self.site.report_of(device).read_text()) for device in self.site.device_ids}
        first, last = status.history[0], _last_accepted(status.history)
        devices = []
        lost = 0
        for held in status.devices:
            report = reports[held.device]
            lost += report["updates_made"] - held.accepted - held.refused - report["outbox_entries"]
            devices.append(
                {
                    "id": held.device,
                    "bytes_up": report["bytes_up"],
                    "bytes_down": report["bytes_down"],
                    "peak_rss_mb": report["peak_rss_mb"],
                    "updates_sent": report["updates_made"],
                    "updates_merged": held.merged,
                    "held_out_before": _share(first.evidence.get(held.device)),
                    "held_out_after": _share(last.evidence.get(held.device)),
                    "torch_importable": report["torch_importable"],
                }
            )
        return Facts(
            model=self.site.folder / "gateway" / MODEL_FILE,
            rounds=status.round,
            broker=self.broker_description.split()[0],
            updates_sent=sum(device["updates_sent"] for device in devices),
            updates_merged=status.merged,
            trained=status.trained,
            measured=status.measured,
            lost=lost,
            duplicated=status.duplicated,
            devices=devices,
        )

    def close(self) -> None:
        """End whatever still runs."""
        self._end_devices()
        if self.gateway is not None:
            _end([self.gateway])
            self.gateway = None

    def start_gateway(self) -> None:
        """Start the gateway's process, for the first time or again."""
        arguments = ["-m", "edge_sdk.cli", "-v", "aggregator", "run", str(self.site.job), "--demo"]
        if self._options.broker != "auto":
            arguments += ["--broker", self._options.broker]
        self.gateway = self._spawn(Path(sys.executable), arguments, "gateway")

    def start_device(self, device: str) -> None:
        """Start a device's process, for the first time or again."""
        program = CHECKOUT / "examples" / "watch_device.py"
        data, report = self.site.data_of(device), self.site.report_of(device)
        config = self.site.config_of(device)
        arguments = [str(program), str(config), "--data", str(data), "--report", str(report)]
        self.devices[device] = self._spawn(self.site.device_python, arguments, device)

    def _spawn(self, python: Path, arguments: Sequence[str], name: str) -> subprocess.Popen[bytes]:
        # Not PYTHONPATH: a device sees its own environment and nothing of this checkout.
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment["PYTHONUNBUFFERED"] = "1"
        with (self.site.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [python, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=self.site.folder,
                start_new_session=True,  # an interrupt at the terminal is ours to pass on
                preexec_fn=_end_with_parent,  # noqa: PLW1509 - one system call, no Python state is touched
            )

    def _wait_for_broker(self) -> str:
        assert self.gateway is not None
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if self.gateway.poll() is not None:
                raise FederationError(f"the gateway did not start: {self._last_words('gateway')}")
            description = self.status().broker
            found = re.search(r"mqtts?://\S+[0-9]", description)
            if found:
                self.broker_description = description
                return found[0]
            time.sleep(0.1)
        raise FederationError(f"the gateway has no broker after {START_SECONDS:.0f} s: {self._last_words('gateway')}")

    def _last_words(self, name: str) -> str:
        path = self.site.folder / f"{name}.log"
        lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
        return f"{lines[-1] if lines else 'it said nothing'} (more in {path})"

    def _end_devices(self) -> None:
        _end(list(self.devices.values()))
        self.devices.clear()


class LiveTable:
    """One row per round, and below it, on a terminal, a line that says what is going on right now."""

    HEAD = "   round  outcome       held-out accuracy    merged    truncated    KiB up/down    seconds"

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._shown: set[int] = set()

    def show(self, status: Status) -> None:
        """Print the rounds that are new since the last call."""
        for record in status.history:
            if record.outcome is not None and record.round not in self._shown:
                self._clear()
                if not self._shown:
                    print(self.HEAD)
                self._shown.add(record.round)
                print(_row(record), flush=True)
        if self._live:
            online = sum(device.online for device in status.devices)
            doing = f"   round {status.round} of {status.rounds}: {status.phase}, {status.answered} of {status.assigned} answered"
            print(f"\r\x1b[2K{doing}, {online} devices online", end="", flush=True)

    def close(self) -> None:
        """Remove the line of the moment."""
        self._clear()

    def _clear(self) -> None:
        if self._live:
            print("\r\x1b[2K", end="")


def _row(record: RoundRecord) -> str:
    before = "     " if record.score_before is None else f"{record.score_before:.3f}"
    after = "  -  " if record.score_after is None else f"{record.score_after:.3f}"
    cut = record.merge.get("truncation_error")
    up, down = (sum(pair[i] for pair in record.traffic.values()) / 1024 for i in (0, 1))
    return (
        f"   {record.round:>5}  {record.outcome or '':<12}  {before} -> {after}       {record.merged}/{len(record.assigned)}"
        f"       {'  -  ' if cut is None else f'{cut:.3f}'}        {up:5.0f}/{down:<5.0f}    {record.seconds or 0:5.1f}"
    )


def _last_accepted(history: Sequence[RoundRecord]) -> RoundRecord:
    return next(record for record in reversed(history) if record.outcome == "accepted")


def _share(counts: Sequence[float] | None) -> float | None:
    return counts[0] / counts[1] if counts else None


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    until = time.monotonic() + STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
