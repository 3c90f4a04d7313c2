"""Commands to mosquitto's dynamic-security plugin, given as the enroller over `$CONTROL/dynamic-security/v1`.

A command is done when the plugin has answered it without an error, not when the broker has taken it. "Not found" and
"already exists" are answers, not failures: every caller may have been killed half way, and repeats.
"""

from __future__ import annotations

import json
import queue
import secrets
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Self

from devices.roles import CONTROL, Acls, device_role
from edge_sdk.errors import EdgewiseError
from edge_sdk.link import Link, LinkDown, LinkEvent, LinkUp, Message
from edge_sdk.tls import TlsFiles
from edge_sdk.wire import ENROLLER

_SECONDS: Final = 10.0
_ABSENT: Final = ("not found",)
_PRESENT: Final = ("already exists",)


class BrokerAbsentError(EdgewiseError):
    """The broker does not answer."""

    exit_code = 4


class ControlError(EdgewiseError):
    """The plugin refuses a command."""

    exit_code = 5


class Control:
    """A connection as the enroller; open it with `with`, which raises `BrokerAbsentError` where nobody answers."""

    def __init__(self, url: str, tls: TlsFiles) -> None:
        self._events: queue.Queue[LinkEvent] = queue.Queue()
        self._url = url
        self._link = Link(url, ENROLLER, on_event=self._events.put, session_expiry=0, version="5", tls=tls)

    def __enter__(self) -> Self:
        self._link.connect()
        event = self._next(time.monotonic() + _SECONDS)
        if not isinstance(event, LinkUp):
            self._link.close()
            reason = event.reason if isinstance(event, LinkDown) else f"{self._url}: no answer"
            raise BrokerAbsentError(f"the broker does not answer: {reason}")
        self._link.subscribe([f"{CONTROL}/response"])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._link.close()

    def grant(self, device: str, acls: Acls) -> None:
        """Give a device its role, whatever it had before."""
        role = device_role(device)
        self._do({"command": "createRole", "rolename": role, "acls": acls}, accept=_PRESENT)
        self._do({"command": "modifyRole", "rolename": role, "acls": acls})
        self._do({"command": "createClient", "username": device}, accept=_PRESENT)
        self._do({"command": "enableClient", "username": device})
        if role not in self.roles_of(device):  # for a role that is there, 2.0 answers "Internal error"
            self._do({"command": "addClientRole", "username": device, "rolename": role})

    def withdraw(self, device: str) -> None:
        """End a device's session and take everything from it.

        Disabling comes first because it ends the live session; deleting follows because a disabled client with a
        certificate is let in again by mosquitto 2.0, with all its rights.
        """
        self._do({"command": "disableClient", "username": device}, accept=_ABSENT)
        self._do({"command": "deleteClient", "username": device}, accept=_ABSENT)
        self._do({"command": "deleteRole", "rolename": device_role(device)}, accept=_ABSENT)

    def roles_of(self, device: str) -> list[str]:
        """The roles that the plugin has for a device; empty for one that it does not know."""
        answer = self._do({"command": "getClient", "username": device}, accept=_ABSENT)
        client = answer.get("data", {}).get("client", {})
        return [str(role["rolename"]) for role in client.get("roles", [])]

    def _do(self, command: Mapping[str, Any], accept: tuple[str, ...] = ()) -> Mapping[str, Any]:
        """Send one command and wait for its answer."""
        number = secrets.token_hex(8)
        body = json.dumps({"commands": [{**command, "correlationData": number}]}).encode()
        self._link.publish(CONTROL, body)
        until = time.monotonic() + _SECONDS
        while True:
            event = self._next(until)
            if not isinstance(event, Message):
                reason = "nothing came back" if event is None else str(event)
                raise BrokerAbsentError(f"{self._url}: {command['command']} was not answered: {reason}")
            for answer in json.loads(event.payload).get("responses", []):
                if answer.get("correlationData") != number:
                    continue
                error = str(answer.get("error", ""))
                if error and not any(text in error.lower() for text in accept):
                    raise ControlError(f"{self._url}: the broker refuses {command['command']}: {error}")
                return dict(answer)

    def _next(self, until: float) -> LinkUp | LinkDown | Message | None:
        while (left := until - time.monotonic()) > 0:
            try:
                event = self._events.get(timeout=left)
            except queue.Empty:
                return None
            if isinstance(event, LinkUp | LinkDown | Message):
                return event
        return None
