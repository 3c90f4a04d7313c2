"""The MQTT connection: paho-mqtt with the guards that transport.md, section 7, asks for.

A `Link` makes one attempt to connect per call and never reconnects by itself: when to try again is decided by whoever
knows (`edge_sdk.conversation`, `aggregator.service`). Callbacks only enqueue; nothing that a message holds can end the
network thread. What paho keeps in memory is worth nothing: durability is the outbox's and the journal's.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_sdk.errors import LinkError
from edge_sdk.tls import TlsFiles, client_context
from edge_sdk.wire import WINDOW

log = logging.getLogger(__name__)

Version = Literal["auto", "5", "3.1.1"]
QUEUE: Final = 64  # messages that paho may hold
OVERHEAD: Final = 64  # bytes of headers and properties counted against the broker's limit
PACKET: Final = 131_072  # what the generated configurations allow; used where the broker does not say
_ANSWER_SECONDS = 5.0


class TooLarge(LinkError):
    """A message above the broker's limit: sending it would end the connection, again and again."""


@dataclass(frozen=True)
class Message:
    """A message that came. `mid`, `qos` and `connection` are what `Link.ack` needs."""

    topic: str
    payload: bytes
    retain: bool
    mid: int
    qos: int
    connection: int


@dataclass(frozen=True)
class LinkUp:
    """The broker has accepted us; limits in bytes and messages."""

    session_present: bool
    max_packet: int
    receive_max: int


@dataclass(frozen=True)
class LinkDown:
    """No connection, or no longer."""

    reason: str


@dataclass(frozen=True)
class Sent:
    """The broker has answered for the message `mid` (PUBACK): it is in its memory, or (MQTT 5) `refused` says why not."""

    mid: int
    refused: str = ""


LinkEvent = Message | LinkUp | LinkDown | Sent


@dataclass(frozen=True)
class Will:
    """What the broker says for us when we vanish; the delay needs MQTT 5."""

    topic: str
    payload: bytes
    delay_seconds: int = 30


class Link:
    """One identity's connection to one broker. Events come from the network thread: `on_event` must only enqueue.

    An address `mqtts://` needs `tls`. `floor` gives a time (Unix seconds) that has certainly passed (`edge_sdk.tls`).
    """

    def __init__(
        self,
        url: str,
        client_id: str,
        *,
        on_event: Callable[[LinkEvent], None],
        manual_ack: bool = False,
        session_expiry: int = 86_400,
        keepalive: int = 30,
        version: Version = "auto",
        tls: TlsFiles | None = None,
        floor: Callable[[], int] = lambda: 0,
    ) -> None:
        self._host, self._port = _address(url, tls)
        self._tls, self._floor = tls, floor
        self._url, self._client_id = url, client_id
        self._on_event, self._manual_ack = on_event, manual_ack
        self._session_expiry, self._keepalive = session_expiry, keepalive
        self._versions: list[str] = ["5", "3.1.1"] if version == "auto" else [version]
        self._client: mqtt.Client | None = None
        self._protocol = self._versions[0]
        self._max_packet = PACKET
        self._lock = threading.Lock()
        self._unacknowledged: set[int] = set()
        self._early: set[int] = set()  # acknowledged before `publish` had returned the number
        self._counting = threading.Lock()
        self._attempt = 0
        self.bytes_sent = 0  # topics and payloads
        self.bytes_received = 0

    @property
    def pending(self) -> int:
        """Messages that the broker has not acknowledged."""
        return len(self._unacknowledged)

    def connect(self, will: Will | None = None) -> None:
        """Try once, in the background; ends in `LinkUp` or `LinkDown`. MQTT 5 first, then 3.1.1 where 5 gets no answer."""
        with self._lock:
            self._attempt += 1
            number = self._attempt
        threading.Thread(target=self._try, args=(will, number), name="edgewise-connect", daemon=True).start()

    def disconnect(self) -> None:
        """End the connection in order: the will is not sent. No `LinkDown` follows."""
        with self._lock:
            self._attempt += 1  # whatever is under way no longer counts
            client, self._client = self._client, None
        _end(client)

    def subscribe(self, topics: Iterable[str]) -> None:
        """Subscribe with QoS 1. Raises `LinkError` when there is no connection."""
        client = self._connected()
        if self._protocol == "5":
            client.subscribe([(topic, SubscribeOptions(qos=1)) for topic in topics])
        else:
            client.subscribe([(topic, 1) for topic in topics])

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        retain: bool = False,
        expiry: int | None = None,
        kind: str = "",
    ) -> int:
        """Hand a message to paho and return its `mid`; `Sent(mid)` follows: QoS 1.

        `expiry` in seconds and `kind` (content type) are MQTT 5 hints. Raises `TooLarge`, and `LinkError` when there is no
        connection or paho's queue is full: the message is then not sent.
        """
        client = self._connected()
        size = len(topic) + len(payload) + OVERHEAD
        if size > self._max_packet:
            raise TooLarge(f"a message of {size} bytes to {topic}, the broker takes at most {self._max_packet}")
        properties = None
        if self._protocol == "5":
            properties = _properties(PacketTypes.PUBLISH)
            if expiry is not None:
                properties.MessageExpiryInterval = max(1, expiry)
            properties.ContentType = f"application/vnd.edgewise.{kind}+json" if kind else "application/octet-stream"
        info = client.publish(topic, payload, 1, retain, properties)
        if info.rc != mqtt.MQTT_ERR_SUCCESS:
            raise LinkError(f"{self._url}: the message to {topic} was not taken ({mqtt.error_string(info.rc)})")
        with self._counting:
            if info.mid in self._early:
                self._early.remove(info.mid)
            else:
                self._unacknowledged.add(info.mid)
        self.bytes_sent += len(topic) + len(payload)
        return int(info.mid)

    def ack(self, message: Message) -> None:
        """Receipt a message (`manual_ack` only).

        One of an earlier connection is not receipted: its number means another message now, and it will come again.
        """
        client = self._client
        if client is not None and message.qos and message.connection == self._attempt:
            client.ack(message.mid, message.qos)

    def _forget(self) -> None:
        with self._counting:
            self._unacknowledged.clear()
            self._early.clear()

    def close(self) -> None:
        """As `disconnect`."""
        self.disconnect()

    def _connected(self) -> mqtt.Client:
        client = self._client
        if client is None:
            raise LinkError(f"{self._url}: not connected")
        return client

    def _try(self, will: Will | None, number: int) -> None:
        reason = "no answer"
        for version in list(self._versions):
            with self._lock:
                if number != self._attempt:
                    return
                former, self._client = self._client, None
            _end(former)
            self._forget()
            client, answered, outcome = self._make(version, will, number)
            try:
                if self._tls is not None:
                    client.tls_set_context(client_context(self._tls, self._floor()))
                client.connect(self._host, self._port, self._keepalive, **self._options(version))
                client.loop_start()
            except (OSError, ValueError, LinkError) as error:
                reason = str(error) if not isinstance(error, socket.timeout) else "no answer"
                _end(client)
                break  # nobody listens: another protocol version will not help
            if answered.wait(_ANSWER_SECONDS) and outcome[0] == "":
                self._versions = [version]  # what worked once is what this broker speaks
                return
            reason = outcome[0] or f"no answer to MQTT {version}"
            _end(client)
        if number == self._attempt:
            self._emit(LinkDown(f"{self._url}: {reason}"))

    def _options(self, version: str) -> dict[str, Any]:
        if version != "5":
            return {}
        properties = _properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = self._session_expiry
        properties.ReceiveMaximum = 32
        return {"clean_start": False, "properties": properties}

    def _make(self, version: str, will: Will | None, number: int) -> tuple[mqtt.Client, threading.Event, list[str]]:
        five = version == "5"
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            clean_session=None if five else False,
            protocol=mqtt.MQTTv5 if five else mqtt.MQTTv311,
            reconnect_on_failure=False,
            manual_ack=self._manual_ack,
        )
        client.connect_timeout = _ANSWER_SECONDS
        client.max_queued_messages_set(QUEUE)
        client.max_inflight_messages_set(20)
        if will is not None:
            properties = None
            if five:
                properties = _properties(PacketTypes.WILLMESSAGE)
                properties.WillDelayInterval = will.delay_seconds
            client.will_set(will.topic, will.payload, 1, True, properties)
        answered = threading.Event()
        outcome = ["no answer"]

        def on_connect(_client: mqtt.Client, _data: Any, flags: Any, code: Any, properties: Any) -> None:
            if code.is_failure:
                outcome[0] = f"refused ({code})"
                answered.set()
                return
            outcome[0] = ""
            with self._lock:
                current = number == self._attempt
                if current:
                    self._client, self._protocol = client, version
                    self._max_packet = int(getattr(properties, "MaximumPacketSize", PACKET)) if five else PACKET
            answered.set()
            if current:
                receive_max = int(getattr(properties, "ReceiveMaximum", WINDOW)) if five else WINDOW
                self._emit(LinkUp(bool(flags.session_present), self._max_packet, receive_max))

        def on_disconnect(_client: mqtt.Client, _data: Any, _flags: Any, code: Any, _properties: Any) -> None:
            with self._lock:
                current = self._client is client
                if current:
                    self._client = None
            answered.set()
            if current:
                self._forget()
                self._emit(LinkDown(f"{self._url}: {code}"))

        def on_message(_client: mqtt.Client, _data: Any, message: mqtt.MQTTMessage) -> None:
            self.bytes_received += len(message.payload) + len(message.topic)
            payload = bytes(message.payload)
            self._emit(Message(message.topic, payload, message.retain, message.mid, message.qos, number))

        def on_publish(_client: mqtt.Client, _data: Any, mid: int, code: Any, _properties: Any) -> None:
            if code.is_failure:
                log.warning("%s: a message was refused: %s", self._url, code)
            with self._counting:
                if mid in self._unacknowledged:
                    self._unacknowledged.remove(mid)
                else:
                    self._early.add(mid)
            self._emit(Sent(mid, str(code) if code.is_failure else ""))

        client.on_connect, client.on_disconnect = on_connect, on_disconnect
        client.on_message, client.on_publish = on_message, on_publish
        return client, answered, outcome

    def _emit(self, event: LinkEvent) -> None:
        try:
            self._on_event(event)
        except Exception:
            log.exception("an event of %s was not taken: %s", self._url, type(event).__name__)


def _address(url: str, tls: TlsFiles | None) -> tuple[str, int]:
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or port is None:
        raise LinkError(
            f"the broker's address is {url!r}, expected mqtt://HOST:PORT or mqtts://HOST:PORT, "
            "for instance mqtt://127.0.0.1:18830"
        )
    if (parts.scheme == "mqtts") is not (tls is not None):
        wanted = (
            "needs a certificate: give [tls]" if tls is None else "is not encrypted: with [tls] it must be mqtts://"
        )
        raise LinkError(f"the broker's address {url!r} {wanted}")
    return parts.hostname, port


def _properties(packet: int) -> Properties:
    return Properties(packet)  # type: ignore[no-untyped-call]


def _end(client: mqtt.Client | None) -> None:
    if client is not None:
        client.disconnect()
        client.loop_stop()
