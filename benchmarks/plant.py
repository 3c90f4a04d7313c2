"""The processes of a site, to be killed and started again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.site import Site, end

GATEWAY, BROKER = "gateway", "broker"


def chunked_site(
    folder: Path, devices: list[str], *, chunks: int = 7, broker: str | None = None, tls: bool = False, **job: Any
) -> Site:
    """A site whose updates take so many chunks of 64 KiB, and whose journal keeps them for the audit."""
    features = (chunks * 65_536 - 8_192) // 12  # three rows of float32
    return Site(
        folder,
        devices,
        features=features,
        samples=24,
        broker=broker,
        tls=tls,
        job={"task.encoding": "float32", "task.steps": 2, "journal.keep_updates": True, **job},
    )


def waiting(site: Site, device: str) -> int:
    """How many updates wait in the outbox of a device; its process may run."""
    path = site.folder / device / "store" / "outbox.sqlite"
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=10)) as db:
        return int(db.execute("SELECT count(*) FROM entry").fetchone()[0])


class Plant:
    """Gateway and devices as processes of their own. What died is started again when its time has come."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.ends: list[tuple[str, int]] = []  # (name, return code) of every process that ended

    def start(self, name: str, *, faults: str = "") -> None:
        """Start the gateway or a device; `faults`: the crash point at which it is to die."""
        environment = {"EDGEWISE_FAULTS": faults}
        site = self.site
        self.processes[name] = (
            site.gateway_process(**environment) if name == GATEWAY else site.device_process(name, **environment)
        )

    def kill(self, name: str) -> bool:
        """SIGKILL; False if it does not run. The broker is the gateway's child, and is started again by it."""
        if name == BROKER:
            return self._kill_broker()
        process = self.processes[name]
        if process.poll() is not None:
            return False
        process.kill()
        process.wait()
        self.ends.append((name, process.returncode))
        return True

    def _kill_broker(self) -> bool:
        gateway = self.processes[GATEWAY]
        try:
            mark = json.loads((self.site.folder / "state" / "broker" / "broker.pid").read_text())
            parent = int(Path(f"/proc/{mark['pid']}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            return False
        if gateway.poll() is not None or parent != gateway.pid:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(mark["pid"], signal.SIGKILL)
        return True

    def died(self, name: str, seconds: float = 30.0) -> int:
        """Wait for a process to end by itself; its return code."""
        process = self.processes[name]
        code = process.wait(seconds)
        self.ends.append((name, code))
        return code

    def finish(self, seconds: float = 60.0) -> None:
        """Let the job end, every outbox run empty, and every process stop in order.

        A device that was still training when the job ended keeps its update. It gets its verdict when gateway and device
        meet again.
        """
        for _ in range(4):
            assert self.died(GATEWAY, seconds) == 0, self.log(GATEWAY)
            late = [name for name in self.site.ids if waiting(self.site, name)]
            if not late:
                break
            self.start(GATEWAY)
            for name in late:
                end(self.processes[name])
                self.start(name)
        assert not late, f"these still wait for a verdict: {late}"
        self.close()

    def log(self, name: str) -> str:
        """The end of what a process wrote."""
        return (self.site.folder / f"{name}.log").read_text()[-4000:]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End what still runs."""
        for process in self.processes.values():
            end(process)
