"""What must fail at the broker (transport.md, section 12), tried on a real mosquitto with the generated configuration.

The attacker is the enrolled device `dev-001` unless a test says otherwise; `dev-002` is an honest one beside it.
"""

from __future__ import annotations

import datetime as dt
import os
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from devices.authority import Authority, AuthorityError, Site, read_request
from devices.enroll import Request, request, revoke
from devices.registry import RegistryError
from devices.roles import CONTROL
from edge_sdk.tls import TlsFiles
from tests.security.rig import SITE, YESTERDAY, Rig, refused_by_tls

DENIED = "Not authorized"
UP, DOWN = SITE.metrics("dev-001"), SITE.command("dev-001")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with Rig(tmp_path_factory.mktemp("site")) as rig:
        yield rig


@pytest.fixture
def rig(started: Rig) -> Iterator[Rig]:
    yield started
    started.close_clients()


@pytest.fixture
def own_rig(tmp_path: Path) -> Iterator[Rig]:
    """One whose broker a test may stop."""
    with Rig(tmp_path) as rig:
        yield rig


def test_the_broker_runs_as_nobody_special(rig: Rig) -> None:
    uid = int(Path(f"/proc/{rig.broker.pid}/status").read_text().split("Uid:")[1].split()[0])
    assert uid != 0
    folder = rig.root / "state" / "broker"
    for name in ("server.key", "dynamic-security.json"):
        assert (folder / name).stat().st_mode & 0o077 == 0
        assert os.geteuid() != 0 or (folder / name).stat().st_uid == uid
    config = (folder / "mosquitto.conf").read_text()
    assert "allow_anonymous true" not in config
    assert "acl_file" not in config


# S1


@pytest.mark.parametrize("who", ["without a certificate", "of another CA", "revoked", "expired", "self-signed"])
def test_stranger_is_refused(rig: Rig, who: str) -> None:
    if who == "without a certificate":
        bare = ssl.create_default_context(cafile=rig.identity("dev-001").ca)
        assert refused_by_tls(rig.client("dev-001", context=bare).connect)
    elif who == "of another CA":
        other = Authority.create(rig.root / "elsewhere", Site.at(SITE.site, rig.url, prefix=SITE.prefix))
        assert refused_by_tls(rig.client("dev-001", rig.forge("dev-001", other)).connect)
    elif who == "revoked":
        spare = rig.forge("dev-001", rig.authority)
        rig.client("dev-001", spare).connect().close()
        certificate = x509.load_pem_x509_certificate(spare.certificate.read_bytes())
        before = rig.broker.pid
        rig.authority.revoke([certificate.serial_number])
        rig.await_restart(before)
        assert refused_by_tls(rig.client("dev-001", spare).connect)
    elif who == "expired":
        old = rig.forge("dev-001", rig.authority, now=YESTERDAY - dt.timedelta(days=1), life=dt.timedelta(days=1))
        assert refused_by_tls(rig.client("dev-001", old).connect)
    else:
        assert refused_by_tls(rig.client("dev-001", _self_signed(rig, "dev-001")).connect)
    rig.client("dev-001").connect()
    rig.client("dev-002").connect()


# S2, S10


@pytest.mark.parametrize(
    "topic",
    [
        SITE.metrics("dev-002"),
        SITE.status("dev-002"),
        SITE.command("dev-002"),
        SITE.assign("dev-001"),
        DOWN,
        SITE.round_topic,
        SITE.job_topic,
        UP.replace("bremen", "bogota"),
        "edgewise/v1/bremen/watch/dev/dev-001/up/metrics",
        "anything",
        CONTROL,
        "$SYS/broker/uptime",
    ],
)
def test_device_speaks_only_for_itself(rig: Rig, topic: str) -> None:
    aggregator, attacker = rig.client("aggregator").connect(), rig.client("dev-001").connect()
    assert aggregator.subscribe(f"{SITE.root}/dev/+/up/#").refused == ""
    assert attacker.publish(topic).refused == DENIED
    assert attacker.publish(UP, b"honest").refused == ""
    assert aggregator.heard() == [(UP, b"honest")]


def test_only_the_enroller_controls(rig: Rig) -> None:
    command = b'{"commands":[{"command":"createClient","username":"mallory"}]}'
    for name in ("dev-001", "aggregator"):
        client = rig.client(name).connect()
        assert client.publish(CONTROL, command).refused == DENIED
        assert client.publish("$CONTROL/broker/v1", b"{}").refused == DENIED
        assert client.subscribe(f"{CONTROL}/response").refused
    enroller = rig.client("enroller").connect()
    assert enroller.subscribe(f"{CONTROL}/response").refused == ""
    assert enroller.publish(CONTROL, command).refused == ""
    assert b"error" not in enroller.heard()[0][1]
    assert enroller.publish(UP).refused == DENIED
    assert enroller.subscribe(f"{SITE.root}/#").refused


# S3, S4


@pytest.mark.parametrize(
    "topic",
    [
        "#",
        "+/#",
        "+/+/+/+/+/+/+/+/+/+",
        f"{SITE.root}/#",
        f"{SITE.root}/dev/#",
        f"{SITE.root}/dev/+/down/#",
        f"{SITE.root}/dev/dev-002/down/#",
        f"{SITE.root}/dev/dev-001/up/#",
        f"{SITE.root}/dev/+/up/#",
        "$SYS/#",
        "$CONTROL/#",
        f"{CONTROL}/response",
    ],
)
def test_device_hears_only_its_own(rig: Rig, topic: str) -> None:
    attacker, aggregator = rig.client("dev-001").connect(), rig.client("aggregator").connect()
    assert attacker.subscribe(topic).refused
    for own in SITE.device_subscriptions("dev-001"):
        assert attacker.subscribe(own).refused == ""
    aggregator.publish(SITE.command("dev-002"), b"not for you")
    aggregator.publish(DOWN, b"for you")
    assert attacker.heard() == [(DOWN, b"for you")]


def test_shared_subscription_cannot_be_hijacked(rig: Rig) -> None:
    aggregator, attacker = rig.client("aggregator").connect(), rig.client("dev-001").connect()
    honest = rig.client("dev-002").connect()
    assert aggregator.subscribe(f"{SITE.root}/dev/+/up/#").refused == ""
    for group in ("intake", "x"):
        for topic in (f"{SITE.root}/dev/+/up/offer", f"{SITE.root}/dev/+/up/#", "#"):
            assert attacker.subscribe(f"$share/{group}/{topic}").refused
    for number in range(40):
        assert honest.publish(SITE.offer("dev-002"), str(number).encode()).refused == ""
    assert len(aggregator.heard()) == 40
    assert attacker.heard(0.1) == []


# S5, S6, S7


def test_client_id_takeover_is_impossible(rig: Rig) -> None:
    honest, aggregator = rig.client("dev-002").connect(), rig.client("aggregator").connect()
    aggregator.subscribe(f"{SITE.root}/dev/+/up/#")
    for number in range(100):
        if number in (20, 60):
            attacker = rig.client("dev-002", rig.identity("dev-001")).connect()
            assert attacker.publish(SITE.metrics("dev-002")).refused == DENIED
            assert (
                rig.client("aggregator", rig.identity("dev-001")).connect().publish(SITE.round_topic).refused == DENIED
            )
        assert honest.publish(SITE.metrics("dev-002"), str(number).encode()).refused == ""
    assert not honest.lost.is_set()
    assert not aggregator.lost.is_set()
    assert len(aggregator.heard()) == 100


@pytest.mark.parametrize("user", ["aggregator", "enroller", "dev-002"])
def test_certificate_name_wins(rig: Rig, user: str) -> None:
    attacker = rig.client("dev-001", user=user).connect()
    for topic in (SITE.round_topic, CONTROL, SITE.metrics("dev-002")):
        assert attacker.publish(topic).refused == DENIED
    assert attacker.publish(UP).refused == ""


def test_will_obeys_the_role(rig: Rig) -> None:
    aggregator = rig.client("aggregator").connect()
    aggregator.subscribe(f"{SITE.root}/dev/+/up/#")
    for topic in (SITE.status("dev-002"), SITE.status("dev-001")):
        client = rig.client("dev-001", will=topic)
        try:
            client.connect()
        except AssertionError:  # a broker may also refuse the connection
            assert topic == SITE.status("dev-002")
            continue
        client.mqtt.socket().shutdown(2)
    assert aggregator.heard(1.5) == [(SITE.status("dev-001"), b"a will")]


# S8


@pytest.mark.parametrize(
    "name", ["#", "+", "a/b", "A", "a" * 33, "", "-a", "ä", "a b", "dev\n", "aggregator", "bridge"]
)
def test_ca_refuses_hostile_names(tmp_path: Path, name: str) -> None:
    rig = Rig(tmp_path, devices=())
    key = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(RegistryError, match="must be 1 to 32"):
        rig.enroll(name)
    if name != "aggregator":
        with pytest.raises(RegistryError, match="must be 1 to 32"):
            rig.authority.issue(name, key.public_key(), 1)
    assert rig.authority.issued(name) == [] or name == "aggregator"


def test_a_requests_subject_is_not_copied(tmp_path: Path) -> None:
    rig = Rig(tmp_path, devices=())
    made = request("dev-001", tmp_path / "box")
    _request_as("aggregator", tmp_path / "box" / "dev-001-tls.key", made.csr)
    rig.enroll("dev-001", made=made)
    certificate = x509.load_pem_x509_certificate((rig.device("dev-001").certificate).read_bytes())
    assert certificate.subject.rfc4514_string() == "CN=dev-001"
    with pytest.raises(x509.ExtensionNotFound):
        certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    text = made.csr.read_bytes()
    weak = tmp_path / "weak.csr"
    weak.write_bytes(_signed_request("dev-002", ec.generate_private_key(ec.SECP384R1())))
    with pytest.raises(AuthorityError, match=r"must be EC P-256"):
        read_request(weak)
    weak.write_bytes(text[:-60])
    with pytest.raises(AuthorityError, match="no certificate signing request"):
        read_request(weak)


# S9


def test_oversize_packet_ends_only_its_sender(rig: Rig) -> None:
    honest, attacker = rig.client("dev-002").connect(), rig.client("dev-001").connect()
    attacker.mqtt.publish(UP, bytes(256 * 1024), 1)
    assert attacker.lost.wait(5)
    for _ in range(20):
        assert honest.publish(SITE.metrics("dev-002")).refused == ""
    assert not honest.lost.is_set()


# S11


def test_revocation_is_complete(rig: Rig) -> None:
    made = request("dev-003", rig.root / "box")
    rig.enroll("dev-003", made=made)
    files = TlsFiles(
        rig.device("dev-003").tls.ca, rig.device("dev-003").certificate, rig.root / "box" / "dev-003-tls.key"
    )
    session, honest = rig.client("dev-003", files).connect(), rig.client("dev-002").connect()
    assert session.publish(SITE.metrics("dev-003")).refused == ""
    before, began = rig.broker.pid, time.monotonic()
    assert revoke(rig.authority, "dev-003").confirmed
    assert session.lost.wait(1.0 - (time.monotonic() - began))
    rig.await_restart(before)
    assert refused_by_tls(rig.client("dev-003", files).connect)
    with pytest.raises(RegistryError, match="was revoked, and an id is never given again"):
        rig.enroll("dev-003", made=Request(made.csr, made.public_key))
    assert "dev-003" not in rig.roles()
    assert "dev-003" not in (rig.root / "state" / "broker" / "dynamic-security.json").read_text()
    # Without a role the certificate was worth nothing from the first moment; the broker's restart, after which it is
    # refused, has ended the honest session too. It comes back.
    honest.close()
    assert rig.client("dev-002").connect().publish(SITE.metrics("dev-002")).refused == ""


def test_a_certificate_that_the_broker_has_no_role_for_is_worth_nothing(rig: Rig) -> None:
    stranger = rig.client("dev-009", rig.forge("dev-009", rig.authority)).connect()
    assert stranger.publish(SITE.metrics("dev-009")).refused == DENIED
    assert all(stranger.subscribe(topic).refused for topic in SITE.device_subscriptions("dev-009"))


def test_what_was_revoked_while_the_broker_was_down_stays_out(own_rig: Rig) -> None:
    rig = own_rig
    rig.broker.stop()
    with pytest.raises(Exception, match="repeat this while the broker runs"):
        revoke(rig.authority, "dev-001")
    rig.broker = rig.another_broker()
    rig.broker.start()
    assert refused_by_tls(rig.client("dev-001").connect)
    rig.client("dev-002").connect()
    assert revoke(rig.authority, "dev-001").confirmed


def _self_signed(rig: Rig, name: str) -> TlsFiles:
    files = rig.forge(name, rig.authority)
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(YESTERDAY)
        .not_valid_after(YESTERDAY + dt.timedelta(days=9))
        .sign(key, hashes.SHA256())
    )
    files.certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return files


def _signed_request(name: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    names = x509.SubjectAlternativeName([x509.DNSName("gateway.local")])
    made = x509.CertificateSigningRequestBuilder().subject_name(subject).add_extension(names, critical=False)
    return made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _request_as(name: str, key: Path, csr: Path) -> None:
    held = serialization.load_pem_private_key(key.read_bytes(), None)
    assert isinstance(held, ec.EllipticCurvePrivateKey)
    csr.write_bytes(_signed_request(name, held))
