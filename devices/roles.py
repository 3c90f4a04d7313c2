"""What each identity may say and hear: roles of mosquitto's dynamic-security plugin (transport.md, section 11).

Everything is denied unless a role allows it. A device has a role of its own with its id written out, for patterns such as
`%u` match nothing in mosquitto 2.0. `$CONTROL` belongs to the enroller alone, not even to the aggregator. The site is part
of every topic and the job is not, so one enrolment serves all jobs of a site.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final

from edge_sdk.wire import AGGREGATOR, ENROLLER, ROOT

CONTROL: Final = "$CONTROL/dynamic-security/v1"
_DENIED: Final = {"publishClientSend": False, "publishClientReceive": False, "subscribe": False, "unsubscribe": True}

Acls = list[dict[str, Any]]


def device_role(device: str) -> str:
    """The name of a device's role."""
    return f"device-{device}"


def device_acls(prefix: str, site: str, device: str) -> Acls:
    """A device speaks under its own `up` and hears its own `down` and the announcements to all."""
    root = _root(prefix, site)
    return _acls(
        send=[f"{root}/+/dev/{device}/up/#"],
        hear=[f"{root}/+/dev/{device}/down/#", f"{root}/+/cfg/#"],
    )


def aggregator_acls(prefix: str, site: str) -> Acls:
    """The aggregator announces, speaks to devices and hears them.

    It may also write a device's status, which it does for one case only: to clear what a revoked device left behind.
    """
    root = _root(prefix, site)
    return _acls(
        send=[f"{root}/+/cfg/#", f"{root}/+/dev/+/down/#", f"{root}/+/dev/+/up/status"],
        hear=[f"{root}/+/dev/+/up/#"],
    )


def initial_config(prefix: str, site: str, devices: Iterable[str]) -> str:
    """The plugin's file as it should stand when the broker starts: aggregator, enroller, and these devices."""
    roles = {
        AGGREGATOR: aggregator_acls(prefix, site),
        ENROLLER: _acls(send=["$CONTROL/dynamic-security/#"], hear=["$CONTROL/dynamic-security/#"]),
    }
    clients = {AGGREGATOR: AGGREGATOR, ENROLLER: ENROLLER}
    for device in sorted(devices):
        roles[device_role(device)] = device_acls(prefix, site, device)
        clients[device] = device_role(device)
    content = {
        "defaultACLAccess": _DENIED,
        "roles": [{"rolename": name, "acls": acls} for name, acls in roles.items()],
        "groups": [],
        "clients": [{"username": name, "roles": [{"rolename": role}]} for name, role in clients.items()],
    }
    return json.dumps(content, indent=1) + "\n"


def _root(prefix: str, site: str) -> str:
    return "/".join(part for part in (prefix, ROOT, site) if part)


def _acls(*, send: Iterable[str], hear: Iterable[str]) -> Acls:
    hear = list(hear)
    rules = [("publishClientSend", topic) for topic in send]
    rules += [(kind, topic) for topic in hear for kind in ("publishClientReceive", "subscribePattern")]
    return [{"acltype": kind, "topic": topic, "priority": 0, "allow": True} for kind, topic in rules]
