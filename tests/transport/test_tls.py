"""TLS of a device: whom it believes, and what it does whose clock is wrong."""

from __future__ import annotations

import datetime as dt
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from devices.authority import SERVER, Authority, Site, make_key, new_serial, write
from edge_sdk.errors import LinkError
from edge_sdk.link import Link, LinkDown, LinkUp
from edge_sdk.tls import NO_CHECK_TIME, TlsFiles, client_context
from tests.security.rig import Rig
from tests.system.site import until
from tests.transport.conftest import Peer


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with Rig(tmp_path_factory.mktemp("site")) as started:
        yield started


def in_1970(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of Python only: what OpenSSL asks is the machine's, which is right."""
    monkeypatch.setattr("edge_sdk.tls.time.time", lambda: 42.0)


def connect(rig: Rig, url: str, floor: int = 0) -> LinkUp | LinkDown:
    peer = Peer(url, "dev-001", tls=rig.identity("dev-001"), floor=lambda: floor)
    peer.link.connect()
    event = peer.events.get(timeout=10)
    peer.link.close()
    assert isinstance(event, LinkUp | LinkDown)
    return event


def serve(rig: Rig, begins: dt.datetime, life: dt.timedelta) -> None:
    """Give the broker another certificate, with the life that is asked for, and wait until it shows it."""
    files, before = rig.folder.identity(SERVER), rig.broker.pid
    public = make_key(files.key).public_key()
    write(files.certificate, rig.authority.issue(SERVER, public, new_serial(), now=begins, life=life))
    until(lambda: rig.broker.pid not in (None, before) and listens(rig.port), 5)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_the_flag_has_the_effect_that_its_number_promises(rig: Rig) -> None:
    context = client_context(rig.identity("dev-001"))
    assert not context.verify_flags & NO_CHECK_TIME
    context.verify_flags |= NO_CHECK_TIME
    assert int(context.verify_flags) & NO_CHECK_TIME
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_a_certificate_not_yet_valid_is_taken_only_where_the_clock_is_known_to_be_wrong(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tomorrow = dt.datetime.now(dt.UTC) + dt.timedelta(days=1)
    serve(rig, tomorrow, dt.timedelta(days=30))
    assert "not yet valid" in refusal(connect(rig, rig.url))
    in_1970(monkeypatch)
    assert isinstance(connect(rig, rig.url), LinkUp)


def test_another_host_name_is_refused_whatever_the_clock_says(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    in_1970(monkeypatch)
    # mosquitto listens at 127.0.0.1, and the name leads there, but the certificate does not have it.
    monkeypatch.setattr(socket, "getaddrinfo", _always_here(socket.getaddrinfo))
    assert "Hostname mismatch" in refusal(connect(rig, rig.url.replace("127.0.0.1", "elsewhere.example")))


def test_a_certificate_that_ended_before_the_floor_is_refused_whatever_the_clock_says(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = dt.datetime.now(dt.UTC)
    serve(rig, now - dt.timedelta(days=2), dt.timedelta(days=1))
    assert "expired" in refusal(connect(rig, rig.url))
    in_1970(monkeypatch)
    # The CA is older than the certificate here, as it would be at a real site: nothing yet says that it has ended.
    assert "certificate ended at" in refusal(connect(rig, rig.url, floor=int(time.time_ns() // 1_000_000_000)))


def refusal(event: LinkUp | LinkDown) -> str:
    assert isinstance(event, LinkDown)
    return event.reason


def _always_here(resolve: Any) -> Any:
    return lambda host, port, *rest, **more: resolve("127.0.0.1", port, *rest, **more)


def test_a_renewed_certificate_is_used_at_the_next_connection(rig: Rig) -> None:
    serve(rig, dt.datetime.now(dt.UTC), dt.timedelta(days=30))
    files = rig.identity("dev-001")
    peer = Peer(rig.url, "dev-001", tls=files)
    until(lambda: isinstance(connect(rig, rig.url), LinkUp), 5)
    good = files.certificate.read_bytes()
    files.certificate.write_bytes(rig.identity("dev-002").certificate.read_bytes())
    peer.link.connect()
    assert "not a certificate and its private key" in peer.wait(LinkDown).reason
    files.certificate.write_bytes(good)
    assert isinstance(peer.up(), LinkUp)
    peer.link.close()


def test_scheme_and_certificate_belong_together(rig: Rig, tmp_path: Path) -> None:
    files = rig.identity("dev-001")
    with pytest.raises(LinkError, match=r"needs a certificate: give \[tls\]"):
        Link("mqtts://127.0.0.1:8883", "d", on_event=print)
    with pytest.raises(LinkError, match="is not encrypted"):
        Link("mqtt://127.0.0.1:8883", "d", on_event=print, tls=files)
    with pytest.raises(LinkError, match="no CA certificate in PEM format"):
        client_context(TlsFiles(tmp_path / "none.pem", files.certificate, files.key))


def test_a_broker_of_another_site_is_not_believed(rig: Rig, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other", Site.at("other", rig.url))
    files = rig.identity("dev-001")
    mixed = TlsFiles(other.folder.gateway / "ca.pem", files.certificate, files.key)
    peer = Peer(rig.url, "dev-001", tls=mixed)
    peer.link.connect()
    assert "CERTIFICATE_VERIFY_FAILED" in peer.wait(LinkDown).reason
