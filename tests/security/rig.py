"""A secured site for attacks: CA, enrolled devices, the generated configuration, and connections under any identity."""

from __future__ import annotations

import datetime as dt
import queue
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from aggregator.broker import Broker, Security
from aggregator.job import BrokerSettings
from devices.authority import Authority, Folder, Site, make_key, new_serial, write
from devices.cli import make_keys
from devices.device_folder import DeviceFolder, Settings
from devices.enroll import enroll
from devices.registry import Registry
from devices.roles import initial_config
from edge_sdk.tls import TlsFiles, client_context
from edge_sdk.wire import Address
from tests.system.site import free_port, until

SITE = Address("acme/bremen", "bremen", "watch")


@dataclass(frozen=True)
class Answer:
    """What the broker said to one packet; `refused` is empty where it agreed."""

    refused: str


class Client:
    """An MQTT 5 client that sends exactly what it is told, without any guard of ours."""

    def __init__(self, url: str, context: ssl.SSLContext, name: str = "", *, user: str = "", will: str = "") -> None:
        self.messages: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self.lost = threading.Event()
        self._answers: queue.Queue[Answer] = queue.Queue()
        self.mqtt = mqtt.Client(CallbackAPIVersion.VERSION2, name, protocol=mqtt.MQTTv5, reconnect_on_failure=False)
        self.mqtt.tls_set_context(context)
        if user:
            self.mqtt.username_pw_set(user, "secret")
        if will:
            self.mqtt.will_set(will, b"a will", 1)
        self.mqtt.on_connect = lambda _c, _d, _f, code, _p: self._answers.put(Answer(_refusal([code])))
        self.mqtt.on_publish = lambda _c, _d, _m, code, _p: self._answers.put(Answer(_refusal([code])))
        self.mqtt.on_subscribe = lambda _c, _d, _m, codes, _p: self._answers.put(Answer(_refusal(codes)))
        self.mqtt.on_disconnect = lambda *_: self._end()
        self.mqtt.on_message = lambda _c, _d, message: self.messages.put((message.topic, message.payload))
        self._address = url.removeprefix("mqtts://").rpartition(":")

    def connect(self) -> Self:
        """Connect; raises `OSError` where TLS refuses, `AssertionError` where MQTT does."""
        self.mqtt.connect(self._address[0], int(self._address[2]), 30)
        self.mqtt.loop_start()
        assert self._answer() == Answer("")
        return self

    def publish(self, topic: str, payload: bytes = b"x", **options: Any) -> Answer:
        """Publish with QoS 1 and return what the PUBACK says."""
        self.mqtt.publish(topic, payload, 1, **options)
        return self._answer()

    def subscribe(self, topic: str) -> Answer:
        """Subscribe with QoS 1 and return what the SUBACK says."""
        self.mqtt.subscribe(topic, 1)
        return self._answer()

    def heard(self, seconds: float = 0.5) -> list[tuple[str, bytes]]:
        """What has come, after waiting for more."""
        time.sleep(seconds)
        return [self.messages.get_nowait() for _ in range(self.messages.qsize())]

    def _end(self) -> None:
        self.lost.set()
        self._answers.put(Answer("the connection is lost"))

    def close(self) -> None:
        self.mqtt.disconnect()
        self.mqtt.loop_stop()

    def _answer(self) -> Answer:
        try:
            return self._answers.get(timeout=5)
        except queue.Empty:
            raise AssertionError("the broker did not answer") from None


def _refusal(codes: list[Any]) -> str:
    return ", ".join(str(code) for code in codes if code.is_failure)


class Rig:
    """A running secured broker with the devices `dev-001` and `dev-002`."""

    def __init__(self, root: Path, devices: tuple[str, ...] = ("dev-001", "dev-002")) -> None:
        self.root, self.port = root, free_port()
        site = Site.at(SITE.site, f"mqtts://127.0.0.1:{self.port}", prefix=SITE.prefix)
        self.authority = Authority.create(root / "security", site)
        self.folder: Folder = self.authority.folder
        self.keys = make_keys(root / "keys")
        for device in devices:
            self.enroll(device)
        self.broker = self.another_broker()
        self.clients: list[Client] = []

    def another_broker(self) -> Broker:
        """A broker that begins where the one before ended."""
        settings, security = BrokerSettings(url=None, port=self.port), Security(self.folder.gateway, self.roles)
        return Broker(self.root / "state" / "broker", settings, kind="mosquitto", security=security)

    def await_restart(self, before: int | None) -> None:
        """Wait until the broker, whose process was `before`, has been restarted for a new revocation list and answers."""

        def is_back() -> bool:
            if self.broker.pid in (None, before):
                return False
            try:
                self.client("enroller").connect()
            except (OSError, AssertionError):
                return False
            return True

        until(is_back, 3.0)

    def roles(self) -> str:
        return initial_config(SITE.prefix, SITE.site, Registry.load(self.folder.registry).active)

    @property
    def url(self) -> str:
        return self.authority.site.broker

    def device(self, device: str) -> DeviceFolder:
        return DeviceFolder(self.root / device, device)

    def enroll(self, device: str, **options: Any) -> None:
        settings = Settings(SITE.site, SITE.job, self.url, "watch.bundle", self.keys["control_public"], SITE.prefix)
        enroll(self.authority, device, self.root / device, settings, **options)

    def identity(self, name: str) -> TlsFiles:
        return self.folder.identity(name) if name in ("aggregator", "enroller") else self.device(name).tls

    def forge(self, name: str, authority: Authority, **options: Any) -> TlsFiles:
        """A certificate that `authority` was made to sign, believing in the site's CA."""
        files = DeviceFolder(self.root / f"forged-{len(list(self.root.iterdir()))}", "forged")
        files.make()
        public = make_key(files.tls_key).public_key()
        write(files.certificate, authority.issue(name, public, new_serial(), **options))
        write(files.tls.ca, self.folder.identity("aggregator").ca.read_bytes())
        return files.tls

    def client(self, name: str, files: TlsFiles | None = None, **options: Any) -> Client:
        context = options.pop("context", None) or client_context(files or self.identity(name))
        made = Client(self.url, context, name, **options)
        self.clients.append(made)
        return made

    def __enter__(self) -> Self:
        self.broker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close_clients()
        self.broker.stop()

    def close_clients(self) -> None:
        for client in self.clients:
            client.close()
        self.clients.clear()


def refused_by_tls(connect: Callable[[], object]) -> bool:
    """Whether a connection does not come about. TLS 1.3 tells a client only after its own handshake."""
    try:
        connect()
    except (OSError, AssertionError):
        return True
    return False


YESTERDAY = dt.datetime.now(dt.UTC) - dt.timedelta(days=1)
