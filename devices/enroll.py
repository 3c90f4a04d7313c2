"""Who belongs to a site: enrolment, revocation, renewal (transport.md, section 11).

Each is a list of steps that may be done again without harm. What is under way stands in `authority/pending/ID.json`
before its first step and is removed after its line in the audit log; a command that was killed is finished by giving
it once more. What a step needs to be repeatable, the serial number, is drawn once and kept there.

| enrolment                                      | revocation                                                   |
|------------------------------------------------|--------------------------------------------------------------|
| 1 the id is free, and may be one               | 1 the broker ends the session and forgets client and role    |
| 2 keys and request (made here or by the device)| 2 every certificate of the id goes on the revocation list    |
| 3 the operator is at hand: that is the proof   | 3 the registry says `revoked`: the gateway hears it no more  |
| 4 certificate                                  | 4 audit                                                      |
| 5 role and client at the broker                |                                                              |
| 6 registry                                     |                                                              |
| 7 probe: own topic allowed, another's refused  |                                                              |
| 8 audit                                        |                                                              |

The gateway makes its own broker's roles anew from the registry at every start, so where no broker runs, step 5 is the
registry's entry. A refusal in steps 5 to 7 undoes 5 and 6 and puts the certificate on the revocation list. An id is never
given twice: a revoked device stays in the registry.
"""

from __future__ import annotations

import datetime as dt
import getpass
import json
import queue
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, Literal

from cryptography.hazmat.primitives.asymmetric import ec

from devices.authority import (
    OWN,
    Authority,
    AuthorityError,
    Issued,
    locked,
    make_key,
    make_request,
    new_serial,
    read_request,
    write,
)
from devices.control import BrokerAbsentError, Control, ControlError
from devices.device_folder import DeviceFolder, Settings
from devices.registry import Entry, Registry, RegistryError, check_id
from devices.roles import device_acls, device_role
from edge_sdk import faults
from edge_sdk.errors import EdgewiseError
from edge_sdk.keys import VerifyKey
from edge_sdk.link import Link, LinkDown, LinkEvent, LinkUp, Sent
from edge_sdk.tls import TlsFiles
from edge_sdk.wire import ENROLLER, Address

Action = Literal["enroll", "revoke", "renew"]
_SECONDS: Final = 10.0


class EnrolError(EdgewiseError):
    """A device cannot be enrolled, revoked or renewed as asked."""


class ProbeError(EdgewiseError):
    """The broker lets a new identity do too much or too little."""

    exit_code = 5


@dataclass(frozen=True)
class Operation:
    """One line of the audit log, and while it is under way a file of its own."""

    operation: str
    action: Action
    id: str
    serial: str  # of the certificate that it gives or gave, in hexadecimal
    outcome: str = "under way"


@dataclass(frozen=True)
class Result:
    """What was done: the operation, and whether a running broker confirmed it."""

    operation: Operation
    confirmed: bool


@dataclass(frozen=True)
class Request:
    """What a device made for itself: its certificate request and the public half of the key that signs its offers."""

    csr: Path
    public_key: Path


def request(device: str, folder: Path) -> Request:
    """On the device: make its two keys and the request, in `folder`; what is there already is used again."""
    check_id(device)
    files = DeviceFolder(folder, device)
    files.make()
    write(files.request, make_request(device, make_key(files.tls_key)))
    files.signing_key().save(files.public_key)
    return Request(files.request, files.public_key)


def enroll(
    authority: Authority,
    device: str,
    folder: Path,
    settings: Settings,
    *,
    owner: str = "",
    profile: str = "",
    made: Request | None = None,
) -> Result:
    """Admit a device; what it needs lands in `folder`. `made`: keys that the device made, else they are made here.

    Raises `RegistryError` for an id that is none or taken, `ControlError` and `ProbeError` where the broker refuses; then
    nothing is left of it but a revoked certificate.
    """
    check_id(device)
    with _operation(authority, "enroll", device) as (operation, resumed):
        if authority.is_revoked(int(operation.serial, 16)):
            _undo(authority, operation)
            raise EnrolError(
                f"device {device!r}: an enrolment that the broker had refused is undone now: give it again"
            )
        files = DeviceFolder(folder, device)
        entry = Registry.load(authority.folder.registry).entries.get(device)
        if entry is not None and (entry.revoked or not resumed):
            told = "was revoked, and an id is never given again" if entry.revoked else "is taken"
            _close(authority, operation)
            raise RegistryError(f"device id {device!r} {told}: choose another")
        faults.point("E1")
        files.make()
        public, key = _keys(files, made)
        faults.point("E2")
        write(files.certificate, authority.issue(device, public, int(operation.serial, 16)))
        files.write(replace(settings, tls=True), ca=(authority.folder.authority / "ca.pem").read_bytes())
        faults.point("E3")
        try:
            confirmed = _admit(authority, files, Entry(device, key.text, profile, owner or device), probe=made is None)
        except (ControlError, ProbeError):
            _undo(authority, operation)
            raise
        return Result(_finish(authority, operation, "enrolled"), confirmed)


def revoke(authority: Authority, device: str, *, discard_round: bool = False) -> Result:
    """Shut a device out, for good. Raises `EnrolError` for one that never was.

    `discard_round`: what the gateway has accepted of it for the open round is not merged, or not kept if it was.

    Raises `BrokerAbsentError` where the broker did not answer: everything else is done then, and the command may be
    repeated; the gateway's own broker needs no more than its next start.
    """
    check_id(device)
    entered = device in Registry.load(authority.folder.registry).entries
    if not entered and not authority.issued(device) and _pending(authority, device) is None:
        raise EnrolError(f"device {device!r} is not in {authority.folder.registry}: nothing to revoke")
    with _operation(authority, "revoke", device) as (operation, _):
        faults.point("V1")
        absent: BrokerAbsentError | None = None
        try:
            with _control(authority) as control:
                control.withdraw(device)
        except BrokerAbsentError as error:
            absent = error
        faults.point("V2")
        authority.revoke([issued.serial for issued in authority.issued(device)])
        faults.point("V3")
        registry = Registry.load(authority.folder.registry)
        if device in registry.entries:
            entry = registry.entries[device]
            discard_round = discard_round or entry.discard_round
            registry.entries[device] = replace(entry, revoked=True, discard_round=discard_round)
            registry.save(authority.folder.registry)
        faults.point("V4")
        if absent is not None:
            raise BrokerAbsentError(
                f"device {device!r} is revoked in the list and the registry, but {absent}: repeat this while the broker "
                "runs; the gateway's own broker shuts it out at its next start at the latest"
            )
        return Result(_finish(authority, operation, "revoked"), confirmed=True)


def renew(
    authority: Authority,
    name: str,
    folder: Path | None = None,
    *,
    now: dt.datetime | None = None,
    early: bool = False,
    new_key: bool = False,
    replaces: bool = False,
    csr: Path | None = None,
) -> Issued | None:
    """Give a new certificate to a device (its `folder`) or to one of `OWN`; None if that is not due and not `early`.

    `new_key`: with a new TLS key, or the one of `csr`. `replaces`: the former certificates go on the revocation list, for
    which the device must have the new one by then; otherwise they are good until they end.
    """
    if name not in OWN:
        entry = Registry.load(authority.folder.registry).entries.get(name)
        if entry is None or entry.revoked:
            raise EnrolError(f"device {name!r} {'is revoked' if entry else 'is not enrolled'}: nothing to renew")
        if folder is None:
            raise EnrolError(f"device {name!r}: which folder its new certificate shall go to must be given (--out)")
    moment = now or dt.datetime.now(dt.UTC)
    former = authority.issued(name)
    resumed = _pending(authority, name) is not None
    if former and former[-1].due > moment and not (early or resumed):
        return None
    with _operation(authority, "renew", name) as (operation, _):
        files = authority.folder.identity(name) if folder is None else DeviceFolder(folder, name).tls
        faults.point("N1")
        serial = int(operation.serial, 16)
        fresh = files.key.with_name(f"{files.key.name}.{operation.serial}")
        if csr is not None:
            public = read_request(csr)
        elif new_key and not (resumed and not fresh.exists() and authority.has_issued(name, serial)):
            public = make_key(fresh).public_key()
        elif files.key.exists():
            public = make_key(files.key).public_key()
        else:
            raise EnrolError(f"{files.key}: the key is not here; give the device's request (--csr)")
        pem = authority.issue(name, public, serial, now=now)
        faults.point("N2")
        if fresh.exists():
            fresh.replace(files.key)
        faults.point("N3")
        write(files.certificate, pem)
        faults.point("N4")
        if replaces:
            authority.revoke([one.serial for one in authority.issued(name) if one.serial != serial])
        _finish(authority, operation, "renewed")
    return next(one for one in authority.issued(name) if one.serial == serial)


def audit_log(authority: Authority) -> list[dict[str, str]]:
    """What was done, oldest first."""
    path = authority.folder.authority / "audit.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _keys(files: DeviceFolder, made: Request | None) -> tuple[ec.EllipticCurvePublicKey, VerifyKey]:
    if made is not None:
        return read_request(made.csr), VerifyKey.load(made.public_key)
    return make_key(files.tls_key).public_key(), files.signing_key()


def _admit(authority: Authority, files: DeviceFolder, entry: Entry, *, probe: bool) -> bool:
    """Steps 5 to 7; whether a broker was there to confirm them."""
    site, device = authority.site, entry.id
    try:
        with _control(authority) as control:
            control.grant(device, device_acls(site.prefix, site.site, device))
            roles = control.roles_of(device)
    except BrokerAbsentError:
        roles = None
    faults.point("E4")
    registry = Registry.load(authority.folder.registry)
    if device not in registry.entries:
        registry.add(entry)
        registry.save(authority.folder.registry)
    faults.point("E5")
    if roles is None:
        return False
    if roles != [device_role(device)]:
        raise ProbeError(f"the broker has the roles {roles} for {device!r}, expected {[device_role(device)]}")
    if probe:
        _probe(authority, device, files.tls)
    faults.point("E6")
    return True


def _probe(authority: Authority, device: str, files: TlsFiles) -> None:
    """Speak as the new device: its own topics must take a message, another's must not."""
    site = authority.site
    address = Address(site.prefix, site.site, "probe")  # no aggregator listens to a job of that name
    other = "probe" if device != "probe" else "other"
    events: queue.Queue[LinkEvent] = queue.Queue()
    link = Link(site.broker, device, on_event=events.put, session_expiry=0, version="5", tls=files)
    link.connect()
    try:
        event = events.get(timeout=_SECONDS)
        if not isinstance(event, LinkUp):
            raise ProbeError(
                f"device {device!r} cannot connect: {event.reason if isinstance(event, LinkDown) else event}"
            )
        for who, allowed in ((device, True), (other, False)):
            link.publish(address.metrics(who), b"probe")
            answer = events.get(timeout=_SECONDS)
            if not isinstance(answer, Sent) or (answer.refused == "") is not allowed:
                raise ProbeError(f"device {device!r} speaking as {who!r}: the broker says {answer}")
    except queue.Empty:
        raise BrokerAbsentError(f"{site.broker}: no answer to the new device {device!r}: repeat the command") from None
    finally:
        link.close()


def _undo(authority: Authority, operation: Operation) -> None:
    authority.revoke([int(operation.serial, 16)])
    registry = Registry.load(authority.folder.registry)
    if registry.entries.pop(operation.id, None) is not None:
        registry.save(authority.folder.registry)
    with suppress(BrokerAbsentError, ControlError), _control(authority) as control:
        control.withdraw(operation.id)
    _finish(authority, operation, "refused by the broker and undone")


def _control(authority: Authority) -> Control:
    return Control(authority.site.broker, authority.folder.identity(ENROLLER))


# What is under way.


@contextmanager
def _operation(authority: Authority, action: Action, name: str) -> Iterator[tuple[Operation, bool]]:
    """The operation of this name, begun or taken up again (then True). A revocation replaces whatever was under way."""
    with locked(authority.folder):
        pending = _pending(authority, name)
        if pending is not None and pending.action != action:
            if action != "revoke":
                raise EnrolError(
                    f"{name!r}: `edgewise devices {pending.action}` was interrupted: give it again, or revoke the device"
                )
            pending = None
        if pending is None:
            begun = Operation(secrets.token_hex(8), action, name, format(new_serial(), "x"))
            if action == "revoke":
                issued = authority.issued(name)
                begun = replace(begun, serial=format(issued[-1].serial, "x") if issued else "")
            write(_path(authority, name), json.dumps(asdict(begun)).encode())
            yield begun, False
        else:
            yield pending, True


def _pending(authority: Authority, name: str) -> Operation | None:
    path = _path(authority, name)
    try:
        return Operation(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise AuthorityError(f"{path}: damaged ({error})") from error


def _path(authority: Authority, name: str) -> Path:
    return authority.folder.authority / "pending" / f"{name}.json"


def _finish(authority: Authority, operation: Operation, outcome: str) -> Operation:
    """The line in the audit log, once, and the end of the operation."""
    done = replace(operation, outcome=outcome)
    path = authority.folder.authority / "audit.jsonl"
    text = path.read_text() if path.exists() else ""
    if operation.operation not in text:
        moment = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        line = json.dumps({"at": moment, "by": getpass.getuser(), **asdict(done)})
        write(path, (text + line + "\n").encode(), mode=0o600)
    faults.point("Z1")
    _close(authority, operation)
    return done


def _close(authority: Authority, operation: Operation) -> None:
    _path(authority, operation.id).unlink(missing_ok=True)
