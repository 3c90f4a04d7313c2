"""The gateway's broker: a supervised mosquitto, or for a demo the embedded iotcore, on the loopback interface.

Rules (transport.md, section 2.2; TLS, roles and other interfaces have their own issue):

1. The order of choice: the job's own `broker.url` (never started or configured by us); mosquitto where it is installed;
   iotcore if the caller asked for a demo; an error that names the package.
2. Every listener binds 127.0.0.1. The port is the job's, or a free one that is kept in the state folder; never 1883 by
   default.
3. mosquitto never runs as root: started by root it gets the user `mosquitto` (or `nobody`), who must then own the state
   folder, and finds its files relative to it, so no folder above has to be open to that user. (iotcore lives in the
   service's own Python environment, which no other user may be able to read; it is for demos only.)
4. A child that dies is started again, after 1 s doubling to 30 s; five deaths within a minute are given up with its last
   lines. It dies with us. What a killed predecessor left running is ended if pid, start time and config path all match.
5. iotcore forgets sessions, queues and retained messages when it restarts, and is never called durable.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import logging
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, Final

from aggregator.job import BrokerSettings
from edge_sdk.errors import EdgewiseError, MissingDependency
from edge_sdk.link import PACKET, Link, LinkDown, LinkEvent, LinkUp

log = logging.getLogger(__name__)

HOST: Final = "127.0.0.1"
_PLACES = "/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin"
_OLDEST = (2, 0)
_READY_SECONDS = 15.0
_STOP_SECONDS = 5.0
_DEATHS, _WITHIN = 5, 60.0
_IOTCORE_PAYLOAD = 262_144
_SERVE_IOTCORE = "import sys; from iotcore import IotCoreBroker; IotCoreBroker(config_path=sys.argv[1]).run_forever()"


class BrokerError(EdgewiseError):
    """The broker cannot be started, or does not stay up."""

    exit_code = 4


def render_config(port: int) -> str:
    """mosquitto's configuration (2.0 and later). Paths are relative to the folder it is started in."""
    return f"""# Written by Edgewise at every start; changes are lost.
listener {port} {HOST}
allow_anonymous true
max_packet_size {PACKET}
max_inflight_messages 20
max_queued_messages 2000
max_queued_bytes 67108864
max_keepalive 300
persistent_client_expiration 14d
persistence true
persistence_location ./
autosave_interval 60
log_dest stderr
log_type error
log_type warning
log_type notice
connection_messages false
"""


def render_iotcore(port: int, port_v5: int) -> str:
    """rumqttd's configuration: one listener per protocol version, payloads up to 256 KiB."""
    listeners = "".join(
        f"""
[{version}.1]
name = "{version}"
listen = "{HOST}:{number}"
next_connection_delay_ms = 1
[{version}.1.connections]
connection_timeout_ms = 60000
max_payload_size = {_IOTCORE_PAYLOAD}
max_inflight_count = 100
"""
        for version, number in (("v4", port), ("v5", port_v5))
    )
    return f"""id = 0
[router]
id = 0
max_connections = 1000
max_outgoing_packet_count = 200
max_segment_size = 104857600
max_segment_count = 10
{listeners}"""


def find_mosquitto() -> tuple[Path, tuple[int, ...]] | None:
    """The program and its version, None where it is not installed or older than 2.0."""
    found = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:{_PLACES}")
    if found is None:
        return None
    told = subprocess.run([found, "-h"], capture_output=True, text=True, check=False, timeout=10).stdout
    match = re.search(r"mosquitto version (\d+)\.(\d+)(?:\.(\d+))?", told)
    version = tuple(int(part) for part in match.groups() if part) if match else (0,)
    if version < _OLDEST:
        log.warning("%s is version %s; at least 2.0 is needed", found, ".".join(map(str, version)))
        return None
    return Path(found), version


def has_iotcore() -> bool:
    """Whether the embedded broker is installed."""
    return importlib.util.find_spec("iotcore") is not None


class Broker:
    """The broker of one job. `demo` allows the embedded one; `kind` forces `mosquitto` or `iotcore` (tests, the demo)."""

    def __init__(self, folder: Path, settings: BrokerSettings, *, demo: bool = False, kind: str = "auto") -> None:
        self._folder, self._settings = folder, settings
        self._demo, self._wanted = demo, kind
        self._child: subprocess.Popen[bytes] | None = None
        self._lines: deque[str] = deque(maxlen=20)
        self._deaths: deque[float] = deque(maxlen=_DEATHS)
        self._stopping = threading.Event()
        self._watcher: threading.Thread | None = None
        self._command: list[str] = []
        self._user: pwd.struct_passwd | None = None
        self.failure: BrokerError | None = None
        self.kind = ""
        self.url = ""
        self.urls: dict[str, str] = {}  # MQTT version -> address

    @property
    def pid(self) -> int | None:
        """The child's process id."""
        return None if self._child is None else self._child.pid

    @property
    def description(self) -> str:
        """For people: which broker, where."""
        if self.kind == "iotcore":
            return f"iotcore (embedded) at {self.url}; demo broker: nothing survives a restart"
        return f"{self.kind} at {self.url}"

    def start(self) -> str:
        """Start it and wait until it answers; return its address. Raises `BrokerError` and `MissingDependency`."""
        self.kind = self._choose()
        if self.kind == "external":
            assert self._settings.url is not None
            self.url = self._settings.url
            return self.url
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._end_orphan()
            if os.geteuid() == 0 and self.kind == "mosquitto":
                self._user = _unprivileged()
            self._configure()
        except OSError as error:
            raise BrokerError(f"{self._folder}: the broker's folder cannot be prepared ({error})") from error
        self._launch()
        if not self._wait_ready():
            self.stop()
            raise BrokerError(f"{self.kind} does not answer at {self.url}: {self._last_lines()}")
        self._watcher = threading.Thread(target=self._watch, name="edgewise-broker", daemon=True)
        self._watcher.start()
        log.info("broker: %s", self.description)
        return self.url

    def stop(self) -> None:
        """SIGTERM, five seconds, SIGKILL. May be called twice; an external broker is left alone."""
        self._stopping.set()
        if self._watcher is not None:
            self._watcher.join(timeout=_STOP_SECONDS)
        child, self._child = self._child, None
        if child is not None:
            child.terminate()
            try:
                child.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            (self._folder / "broker.pid").unlink(missing_ok=True)

    def _choose(self) -> str:
        if self._settings.url is not None:
            return "external"
        if self._wanted in ("auto", "mosquitto") and (found := find_mosquitto()) is not None:
            self._command = [str(found[0]), "-c", "mosquitto.conf"]
            return "mosquitto"
        if self._wanted == "iotcore" or (self._wanted == "auto" and self._demo):
            if has_iotcore():
                self._command = [sys.executable, "-c", _SERVE_IOTCORE, "iotcore.toml"]
                return "iotcore"
            raise MissingDependency(
                "no broker: install mosquitto (apt install mosquitto), or for a demo the embedded one (pip install iotcore)"
            )
        raise MissingDependency(
            "no broker: mosquitto 2.0 or later is not installed (apt install mosquitto); "
            "name one that runs as broker.url in the job file, or try `--demo` with the embedded one"
        )

    def _configure(self) -> None:
        ports = self._ports(2 if self.kind == "iotcore" else 1)
        if self.kind == "iotcore":
            text, name = render_iotcore(*ports), "iotcore.toml"
            self.urls = {"3.1.1": f"mqtt://{HOST}:{ports[0]}", "5": f"mqtt://{HOST}:{ports[1]}"}
        else:
            text, name = render_config(ports[0]), "mosquitto.conf"
            self.urls = dict.fromkeys(("3.1.1", "5"), f"mqtt://{HOST}:{ports[0]}")
        self.url = self.urls["5"]
        (self._folder / name).write_text(text)
        self._folder.chmod(0o700)
        if self._user is not None:
            for path in (self._folder, *self._folder.iterdir()):
                os.chown(path, self._user.pw_uid, self._user.pw_gid)

    def _ports(self, count: int) -> list[int]:
        """The job's port, the one used before if it is free, or a new free one."""
        kept = self._folder / "ports.json"
        if self._settings.port:
            first = self._settings.port
            ports = [first + index for index in range(count)]
            taken = [port for port in ports if not _is_free(port)]
            if taken:
                raise BrokerError(
                    f"port {taken[0]} on {HOST} is in use: change broker.port, or leave it out for a free one"
                )
            return ports
        with contextlib.suppress(OSError, ValueError, TypeError):
            ports = [int(port) for port in json.loads(kept.read_text())]
            # The one before us may need a moment to let go of it.
            until = time.monotonic() + 3.0
            while len(ports) >= count and time.monotonic() < until:
                if all(_is_free(port) for port in ports[:count]):
                    return ports[:count]
                time.sleep(0.1)
        ports = _free_ports(count)
        kept.write_text(json.dumps(ports))
        return ports

    def _launch(self) -> None:
        privileges: dict[str, Any] = {}
        if self._user is not None:
            privileges = {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}
        try:
            self._child = subprocess.Popen(
                self._command,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # an interrupt at the terminal is ours to handle
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - one system call, no Python state is touched
                **privileges,
            )
        except OSError as error:
            raise BrokerError(f"{self._command[0]} cannot be started ({error})") from error
        threading.Thread(target=self._read_log, args=(self._child,), name="edgewise-broker-log", daemon=True).start()
        mark = {"pid": self._child.pid, "started": _start_time(self._child.pid), "config": str(self._folder)}
        (self._folder / "broker.pid").write_text(json.dumps(mark))

    def _read_log(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stderr is not None
        for raw in child.stderr:
            line = raw.decode(errors="replace").strip()
            self._lines.append(line)
            log.debug("%s: %s", self.kind, line)

    def _last_lines(self) -> str:
        return " | ".join(list(self._lines)[-5:]) or "it said nothing"

    def _wait_ready(self) -> bool:
        until = time.monotonic() + _READY_SECONDS
        while time.monotonic() < until and not self._stopping.is_set():
            if self._child is None or self._child.poll() is not None:
                return False
            if answers(self.url):
                return True
            time.sleep(0.05)
        return False

    def _watch(self) -> None:
        while not self._stopping.wait(0.2):
            if self._child is None or self._child.poll() is None:
                continue
            now = time.monotonic()
            self._deaths.append(now)
            log.warning("%s ended with %s: %s", self.kind, self._child.returncode, self._last_lines())
            if len(self._deaths) == _DEATHS and now - self._deaths[0] < _WITHIN:
                self.failure = BrokerError(f"{self.kind} died {_DEATHS} times within a minute: {self._last_lines()}")
                return
            recent = sum(now - at < _WITHIN for at in self._deaths)
            if self._stopping.wait(random.uniform(0.1, min(30.0, 2.0 ** (recent - 1)))):  # noqa: S311 - jitter
                return
            try:
                self._launch()
            except (BrokerError, OSError) as error:
                self.failure = BrokerError(str(error))
                return

    def _end_orphan(self) -> None:
        """End the child of a service that was killed, and nobody else's process."""
        try:
            mark = json.loads((self._folder / "broker.pid").read_text())
            pid = int(mark["pid"])
        except (OSError, ValueError, KeyError, TypeError):
            return
        if mark.get("config") == str(self._folder) and mark.get("started") == _start_time(pid) is not None:
            log.warning("ending the broker (pid %d) that an earlier service left running", pid)
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                until = time.monotonic() + _STOP_SECONDS
                while _start_time(pid) == mark["started"] and time.monotonic() < until:
                    time.sleep(0.05)
        (self._folder / "broker.pid").unlink(missing_ok=True)


def answers(url: str) -> bool:
    """Whether a broker accepts a connection there."""
    got = threading.Event()
    came: list[LinkEvent] = []

    def take(event: LinkEvent) -> None:
        if isinstance(event, LinkUp | LinkDown):
            came.append(event)
            got.set()

    link = Link(url, f"probe-{os.getpid()}", on_event=take, session_expiry=0)
    link.connect()
    got.wait(10.0)
    link.close()
    return bool(came) and isinstance(came[0], LinkUp)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _unprivileged() -> pwd.struct_passwd:
    for name in ("mosquitto", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise BrokerError("there is no user mosquitto and no user nobody, and the broker must not run as root")


def _start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (proc(5), field 22); None if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for held in sockets:
            held.bind((HOST, 0))
        return [int(held.getsockname()[1]) for held in sockets]
