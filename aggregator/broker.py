"""The gateway's broker: a supervised mosquitto, or for a demo the embedded iotcore.

Rules (transport.md, section 2.2):

1. The order of choice: the job's own `broker.url` (never started or configured by us); mosquitto where it is installed;
   iotcore if the caller asked for a demo; an error that names the package.
2. Without TLS every listener binds the loopback interface, and another address is refused. The port is the job's, or a
   free one that is kept in the state folder; never 1883 by default.
3. mosquitto never runs as root: started by root it gets the user `mosquitto` (or `nobody`), who must then own the state
   folder, and finds its files relative to it, so no folder above has to be open to that user. (iotcore lives in the
   service's own Python environment, which no other user may be able to read; it is for demos only.)
4. A child that dies is started again, after 1 s doubling to 30 s; five deaths within a minute are given up with its last
   lines. It dies with us. What a killed predecessor left running is ended if pid, start time and config path all match.
5. With `security.folder` the listener asks every client for a certificate of the site's CA that is not on its revocation
   list; user name and client id are the certificate's common name, and what a name may say and hear is decided by the
   dynamic-security plugin, which denies by default. The plugin's file is made anew from the registry whenever mosquitto
   starts, so that what was enrolled or revoked while it did not run holds from its first moment; changes at run time come
   from the enroller (`devices.enroll`). Certificates and revocation list are watched: when they change, mosquitto is
   restarted in order, so that it reads them. It is not told to reload (SIGHUP): 2.0.11 then "disconnects" sessions whose
   clients are away, and crashes soon after.
6. iotcore forgets sessions, queues and retained messages when it restarts, and is never called durable.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import ipaddress
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from aggregator.job import BrokerSettings
from edge_sdk.errors import EdgewiseError, MissingDependency
from edge_sdk.link import PACKET, Link, LinkDown, LinkEvent, LinkUp
from edge_sdk.tls import TlsFiles
from edge_sdk.wire import AGGREGATOR

log = logging.getLogger(__name__)

HOST: Final = "127.0.0.1"
SESSION_EXPIRY: Final = 7 * 86_400  # seconds that the broker keeps for the aggregator what came while it was away
SECURITY_FILES: Final = ("ca.pem", "crl.pem", "server.pem", "server.key")
ROLES_FILE: Final = "dynamic-security.json"
_PLACES = "/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin"
_PLUGIN_PLACES = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/opt/homebrew/lib")
_OLDEST = (2, 0)
_PERSISTENCE_PLUGIN = (2, 1)  # the first version that brings one
_LOOK = 0.1  # seconds between looks at the child and its certificates
_READY_SECONDS = 15.0
_STOP_SECONDS = 5.0
_DEATHS, _WITHIN = 5, 60.0
_IOTCORE_PAYLOAD = 262_144
_SERVE_IOTCORE = "import sys; from iotcore import IotCoreBroker; IotCoreBroker(config_path=sys.argv[1]).run_forever()"


class BrokerError(EdgewiseError):
    """The broker cannot be started, or does not stay up."""

    exit_code = 4


@dataclass(frozen=True)
class Security:
    """`folder` holds the gateway's certificates and keys (`devices.authority`); `roles` gives the plugin's file, made anew."""

    folder: Path
    roles: Callable[[], str]

    @property
    def aggregator(self) -> TlsFiles:
        """The identity of the aggregator."""
        folder = self.folder
        return TlsFiles(folder / "ca.pem", folder / f"{AGGREGATOR}.pem", folder / f"{AGGREGATOR}.key")


def render_config(
    port: int,
    *,
    address: str = HOST,
    roles_plugin: Path | None = None,
    persistence_plugin: Path | None = None,
) -> str:
    """mosquitto's configuration (2.0 and later). Relative paths start in the folder it is started in.

    With `roles_plugin` (dynamic-security) the listener speaks TLS and asks for certificates. `persistence_plugin` is the one
    of 2.1, which replaces the file that 2.0 writes. Raises `BrokerError` for an address beyond this machine without TLS.
    """
    if roles_plugin is None:
        _check_loopback(address)
    lines = ["# Written by Edgewise at every start; changes are lost.", f"listener {port} {address}"]
    if roles_plugin is None:
        lines += ["allow_anonymous true"]
    else:
        lines += [
            "allow_anonymous false",
            "cafile ca.pem",
            "crlfile crl.pem",
            "certfile server.pem",
            "keyfile server.key",
            "tls_version tlsv1.2",
            "require_certificate true",
            "use_identity_as_username true",
            "use_username_as_clientid true",
            f"plugin {roles_plugin}",
            f"plugin_opt_config_file {ROLES_FILE}",
        ]
    lines += [
        f"max_packet_size {PACKET}",
        "max_inflight_messages 20",
        "max_queued_messages 2000",
        "max_queued_bytes 67108864",
        "max_keepalive 300",
        "persistent_client_expiration 14d",
    ]
    if persistence_plugin is None:
        lines += ["persistence true", "persistence_location ./", "autosave_interval 60"]
    else:
        lines += ["persistence_location ./", f"plugin {persistence_plugin}", "plugin_opt_sync normal"]
    lines += ["log_dest stderr", *(f"log_type {kind}" for kind in ("error", "warning", "notice"))]
    return "\n".join([*lines, "connection_messages false", ""])


def _check_loopback(address: str) -> None:
    if not ipaddress.ip_address(address).is_loopback:
        raise BrokerError(f"without TLS the broker listens on loopback only, not at {address}: give security.folder")


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


def find_plugin(name: str) -> Path | None:
    """A plugin of mosquitto, such as `mosquitto_dynamic_security`; None where it is not installed."""
    for place in _PLUGIN_PLACES:
        for pattern in (f"{name}.so", f"*/{name}.so", f"mosquitto/{name}.so"):
            found = sorted(Path(place).glob(pattern))
            if found:
                return found[0]
    return None


def has_iotcore() -> bool:
    """Whether the embedded broker is installed."""
    return importlib.util.find_spec("iotcore") is not None


class Broker:
    """The broker of one job. `demo` allows the embedded one; `kind` forces `mosquitto` or `iotcore` (tests, the demo)."""

    def __init__(
        self,
        folder: Path,
        settings: BrokerSettings,
        *,
        demo: bool = False,
        kind: str = "auto",
        security: Security | None = None,
    ) -> None:
        self._folder, self._settings, self._security = folder, settings, security
        self._version: tuple[int, ...] = ()
        self._copied: tuple[tuple[int, int], ...] = ()  # the certificates as they were copied last
        self._seen: tuple[tuple[int, int], ...] = ()  # and as they were at the last look
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
        if self._security is None:
            _check_loopback(self._settings.address)
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
        self._end_child()

    def _end_child(self) -> None:
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
            self._command, self._version = [str(found[0]), "-c", "mosquitto.conf"], found[1]
            return "mosquitto"
        if self._security is not None:
            raise MissingDependency(
                "mosquitto is not installed (apt install mosquitto); no other broker checks certificates"
            )
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
            text, name = self._render(ports[0]), "mosquitto.conf"
            self.urls = dict.fromkeys(("3.1.1", "5"), self._own_url(ports[0]))
        self.url = self.urls["5"]
        (self._folder / name).write_text(text)
        self._folder.chmod(0o700)
        if self._user is not None:
            for path in (self._folder, *self._folder.iterdir()):
                os.chown(path, self._user.pw_uid, self._user.pw_gid)

    def _render(self, port: int) -> str:
        roles = None
        if self._security is not None:
            roles = find_plugin("mosquitto_dynamic_security")
            if roles is None:
                raise MissingDependency(
                    "mosquitto's dynamic-security plugin is not installed; Debian and Ubuntu have it in the package "
                    "mosquitto, where it decides what each device may say and hear"
                )
        store = find_plugin("mosquitto_persist_sqlite") if self._version >= _PERSISTENCE_PLUGIN else None
        return render_config(port, address=self._settings.address, roles_plugin=roles, persistence_plugin=store)

    def _own_url(self, port: int) -> str:
        address = ipaddress.ip_address(self._settings.address)
        if address.is_unspecified:
            address = ipaddress.ip_address("::1" if address.version == 6 else HOST)
        host = f"[{address}]" if address.version == 6 else str(address)
        return f"{'mqtt' if self._security is None else 'mqtts'}://{host}:{port}"

    # Certificates, revocation list and roles.

    def _copy_certificates(self) -> None:
        """Give the child its own copies, which its user may read. Raises `BrokerError`."""
        assert self._security is not None
        stamp: tuple[tuple[int, int], ...] = ()
        with contextlib.suppress(OSError):  # one that is missing is named below
            stamp = self._certificates()
        for name in SECURITY_FILES:
            try:
                self._put(name, (self._security.folder / name).read_bytes())
            except OSError as error:
                raise BrokerError(
                    f"{self._security.folder / name}: cannot be given to the broker ({error.strerror}); "
                    "`edgewise devices init-ca` makes it"
                ) from error
        self._copied = stamp

    def _certificates(self) -> tuple[tuple[int, int], ...]:
        """What shows that one of the files has changed."""
        assert self._security is not None
        stats = ((self._security.folder / name).stat() for name in SECURITY_FILES)
        return tuple((found.st_mtime_ns, found.st_ino) for found in stats)

    def _put(self, name: str, data: bytes) -> None:
        """Write a file for the child whole or not at all, readable by its user alone."""
        aside = self._folder / f"{name}.part"
        aside.unlink(missing_ok=True)
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
        if self._user is not None:
            os.chown(aside, self._user.pw_uid, self._user.pw_gid)
        aside.replace(self._folder / name)

    def _renew_certificates(self) -> None:
        """Restart the child in order if its certificates or revocation list have changed and are at rest."""
        if self._security is None:
            return
        try:
            now = self._certificates()
        except OSError as error:
            log.error("the broker goes on with the certificates it has: %s", error)
            return
        seen, self._seen = self._seen, now
        if now == self._copied or now != seen:
            return
        log.info("certificates or revocation list have changed: the broker is restarted")
        self._end_child()
        if not self._stopping.is_set():
            self._launch()

    def _ports(self, count: int) -> list[int]:
        """The job's port, the one used before if it is free, or a new free one."""
        kept = self._folder / "ports.json"
        if self._settings.port:
            first = self._settings.port
            ports = [first + index for index in range(count)]
            address = self._settings.address
            taken = [port for port in ports if not _is_free(port, address)]
            if taken:
                raise BrokerError(
                    f"port {taken[0]} on {address} is in use: change broker.port, or leave it out for a free one"
                )
            return ports
        with contextlib.suppress(OSError, ValueError, TypeError):
            ports = [int(port) for port in json.loads(kept.read_text())]
            # The one before us may need a moment to let go of it.
            until = time.monotonic() + 3.0
            while len(ports) >= count and time.monotonic() < until:
                if all(_is_free(port, self._settings.address) for port in ports[:count]):
                    return ports[:count]
                time.sleep(0.1)
        ports = _free_ports(count, self._settings.address)
        kept.write_text(json.dumps(ports))
        return ports

    def _launch(self) -> None:
        privileges: dict[str, Any] = {}
        if self._security is not None:
            self._copy_certificates()
            self._put(ROLES_FILE, self._security.roles().encode())
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
            if answers(self.url, None if self._security is None else self._security.aggregator):
                return True
            time.sleep(0.05)
        return False

    def _watch(self) -> None:
        while not self._stopping.wait(_LOOK):
            if self._child is None:
                continue
            if self._child.poll() is None:
                try:
                    self._renew_certificates()
                except (EdgewiseError, OSError) as error:
                    self.failure = BrokerError(str(error))
                    return
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
            except (EdgewiseError, OSError) as error:
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


def answers(url: str, tls: TlsFiles | None = None) -> bool:
    """Whether a broker accepts a connection there; with `tls`, as the aggregator, whose session is left as it is."""
    got = threading.Event()
    came: list[LinkEvent] = []

    def take(event: LinkEvent) -> None:
        if isinstance(event, LinkUp | LinkDown):
            came.append(event)
            got.set()

    if tls is None:
        link = Link(url, f"probe-{os.getpid()}", on_event=take, session_expiry=0)
    else:
        link = Link(url, AGGREGATOR, on_event=take, manual_ack=True, session_expiry=SESSION_EXPIRY, tls=tls)
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


def _is_free(port: int, address: str) -> bool:
    with socket.socket(_family(address)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def _free_ports(count: int, address: str) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket(_family(address))) for _ in range(count)]
        for held in sockets:
            held.bind((address, 0))
        return [int(held.getsockname()[1]) for held in sockets]


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
