"""A small site for tests and benchmarks: keys, registry, job file, bundle and devices in one folder, all real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from aggregator.job import load_job
from aggregator.journal import Status, read_status
from aggregator.service import Service
from benchmarks.tiny_bundle import HEAD, tiny_bundle, tiny_data
from devices.authority import Authority
from devices.authority import Site as AuthoritySite
from devices.cli import make_keys
from devices.device_folder import DeviceFolder, Settings
from devices.enroll import enroll
from devices.registry import Entry, Registry
from edge_sdk import EdgeDevice
from edge_sdk.keys import SigningKey
from edge_sdk.tls import TlsFiles


class Site:
    """`job` holds overrides of the job file by dotted key; `samples` is how many each device has.

    `make_bundle` writes a bundle whose samples are like the tiny one's. With `tls` there is a certificate authority, and every connection is mutual TLS.
    """

    def __init__(
        self,
        folder: Path,
        devices: Sequence[str],
        *,
        job: dict[str, Any] | None = None,
        features: int = 4,
        samples: int = 60,
        broker: str | None = None,
        limits: dict[str, Any] | None = None,
        tls: bool = False,
        make_bundle: Callable[[Path], object] | None = None,
    ) -> None:
        self.folder = folder
        self.ids = list(devices)
        self.features = features
        self.bundle = folder / "tiny.bundle"
        if make_bundle is None:
            tiny_bundle(self.bundle, features=features)
        else:
            make_bundle(self.bundle)
        self.keys = make_keys(folder / "keys")
        self.port = free_port()
        self.broker = broker or f"{'mqtts' if tls else 'mqtt'}://127.0.0.1:{self.port}"
        security = folder / "security"
        self.authority = Authority.create(security, AuthoritySite.at("test", self.broker)) if tls else None
        self.registry = security / "devices.json" if tls else folder / "devices.json"
        if not tls:
            self.registry.write_text('{"devices": []}')
        for number, device in enumerate(devices):
            self.add_device(device, limits or {})
            if not samples:
                continue
            with EdgeDevice.open(self.config(device)) as opened:
                x, y = tiny_data(samples, features=features, seed=number + 10)
                opened.record_many(x, y, recording="all")
        self.job = folder / "job.toml"
        self._settings, self._own_broker = dict(job or {}), broker is None
        self.write_job(self._settings)

    def add_device(self, device: str, limits: dict[str, Any]) -> None:
        (self.folder / device).mkdir()
        if self.authority is not None:
            settings = Settings("test", "tiny", self.broker, "../tiny.bundle", self.keys["control_public"])
            enroll(self.authority, device, self.folder / device, settings)
            (self.folder / device / f"{device}.key").rename(self.folder / device / "device.key")
        else:
            registry = Registry.load(self.registry)
            key = SigningKey.generate(self.folder / device / "device.key")
            registry.add(Entry(device, key.verify_key.text))
            registry.save(self.registry)
        self._write_device(device, limits)

    def tls(self, device: str) -> TlsFiles | None:
        """What a device connects with."""
        return None if self.authority is None else DeviceFolder(self.folder / device, device).tls

    def _write_device(self, device: str, limits: dict[str, Any]) -> None:
        values = {
            "id": device,
            "site": "test",
            "job": "tiny",
            "broker": self.broker,
            "bundle": "../tiny.bundle",
            "store": "store",
            "device_key": "device.key",
            "control_key": "../keys/control.pub",
        }
        lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
        if limits:
            lines += ["[limits]", *(f"{name} = {value}" for name, value in limits.items())]
        if files := self.tls(device):
            lines += ["[tls]", *(f"{name} = {json.dumps(str(path))}" for name, path in asdict(files).items())]
        self.config(device).write_text("\n".join(lines) + "\n")

    def config(self, device: str) -> Path:
        return self.folder / device / "device.toml"

    def change_job(self, **changes: Any) -> None:
        """Write the job file again with these keys changed, and all others as before."""
        self._settings |= changes
        self.write_job(self._settings)

    def write_job(self, changes: dict[str, Any]) -> None:
        values: dict[str, Any] = {
            "site": "test",
            "job": "tiny",
            "bundle": "tiny.bundle",
            "program": HEAD,
            "rounds": 2,
            "state": "state",
            "keys.control": "keys/control.key",
            "devices.registry": str(self.registry),
            **({} if self.authority is None else {"security.folder": str(self.authority.folder.gateway)}),
            "round.devices_wait": len(self.ids),
            "round.deadline_seconds": 60,
            "task.steps": 10,
            "task.batch_size": 8,
            "task.learning_rate": 0.1,
            "merge.rule": "mean",
            **({"broker.port": self.port} if self._own_broker else {"broker.url": self.broker}),
            **changes,
        }
        top = [f"{k} = {toml(v)}" for k, v in values.items() if "." not in k]
        for table in sorted({k.split(".")[0] for k in values if "." in k}):
            top.append(f"[{table}]")
            top += [f"{k.split('.', 1)[1]} = {toml(v)}" for k, v in values.items() if k.startswith(f"{table}.")]
        self.job.write_text("\n".join(top) + "\n")

    def status(self) -> Status:
        return read_status(load_job(self.job))

    def service(self, **options: Any) -> Running:
        return Running(Service(load_job(self.job), **options))

    def gateway_process(self, **environment: str) -> subprocess.Popen[bytes]:
        return spawn(
            ["-m", "edge_sdk.cli", "-v", "aggregator", "run", str(self.job)], self.folder / "gateway.log", environment
        )

    def device_process(self, device: str, **environment: str) -> subprocess.Popen[bytes]:
        code = (
            "import sys, signal, threading, logging; from edge_sdk import EdgeDevice\n"
            "logging.basicConfig(level=logging.INFO)\n"
            "stop = threading.Event(); signal.signal(signal.SIGTERM, lambda *_: stop.set())\n"
            "with EdgeDevice.open(sys.argv[1]) as device:\n"
            "    device.start(); stop.wait()\n"
        )
        return spawn(["-c", code, str(self.config(device))], self.folder / f"{device}.log", environment)


def toml(value: Any) -> str:
    """A value in TOML."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {toml(item)}" for name, item in value.items()) + " }"
    return json.dumps(value)


def spawn(arguments: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start Python with these arguments; what it writes goes to the end of `log`."""
    with log.open("ab") as sink:
        return subprocess.Popen(
            [sys.executable, *arguments], stdout=sink, stderr=sink, env={**os.environ, **environment}
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, ten seconds, SIGKILL."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Running:
    """A service in a thread of this process."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.result: Status | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self.result = self.service.run()
        except BaseException as error:  # noqa: BLE001 - raised by `wait`
            self.error = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.service.stop()
        self._thread.join(20)

    def wait(self, seconds: float = 60.0) -> Status:
        self._thread.join(seconds)
        if self.error is not None:
            raise self.error
        assert self.result is not None, "the job did not end in time"
        return self.result


def free_port() -> int:
    """A port of the loopback interface that nobody uses now."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Wait for a condition and return what it gave."""
    end_at = time.monotonic() + seconds
    while time.monotonic() < end_at:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("the condition did not come true in time")
