"""Enrolment and renewal: what comes out, and that any step may be killed and the command given again."""

from __future__ import annotations

import datetime as dt
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from devices.authority import OWN, Authority, AuthorityError, Site
from devices.control import Control
from devices.enroll import EnrolError, ProbeError, audit_log, enroll, renew, request
from devices.registry import Registry, RegistryError
from edge_sdk.cli import main
from edge_sdk.config import DeviceConfig
from edge_sdk.faults import VARIABLE
from edge_sdk.keys import SigningKey
from tests.security.rig import SITE, Rig, refused_by_tls
from tests.transport.test_tls import listens

INIT = ["I1", "I2", "I3", "I4", "I4:2", "I4:3"]
ENROL = ["E1", "E2", "E3", "E4", "E5", "E6", "Z1"]
RENEW = ["N1", "N2", "N3", "N4", "C1", "Z1"]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig(tmp_path, devices=("dev-002",)) as started:
        yield started


def command(*arguments: object, fault: str = "") -> subprocess.CompletedProcess[str]:
    """`edgewise devices ...` as a process, to be killed at a crash point."""
    return subprocess.run(
        [sys.executable, "-m", "edge_sdk.cli", "devices", *map(str, arguments)],
        env={**os.environ, VARIABLE: fault},
        capture_output=True,
        text=True,
        timeout=60,
    )


def enrolment(rig: Rig, device: str) -> list[object]:
    keys, out = rig.keys["control_public"], rig.root / device
    return [
        *("enroll", device, "--ca", rig.folder.root, "--job", SITE.job, "--bundle", "watch.bundle"),
        *("--control-key", keys, "--out", out),
    ]


def private_keys(root: Path) -> list[Path]:
    return [path for path in root.rglob("*.key") if path.is_file()]


def test_an_authority_gives_the_gateway_what_it_needs_and_nothing_is_readable_by_others(tmp_path: Path) -> None:
    arguments = ["--site", "bremen", "--broker", "mqtts://gateway.local:8883", "--host", "10.0.0.5"]
    assert main(["devices", "init-ca", str(tmp_path / "s"), *arguments]) == 0
    folder = Authority(tmp_path / "s").folder
    assert {path.name for path in folder.gateway.iterdir()} == {
        *("ca.pem", "crl.pem", "server.pem", "server.key", "aggregator.pem", "aggregator.key")
    }
    assert len(private_keys(folder.root)) == 4
    assert {path.stat().st_mode & 0o777 for path in private_keys(folder.root)} == {0o600}
    ca = x509.load_pem_x509_certificate((folder.gateway / "ca.pem").read_bytes())
    server = x509.load_pem_x509_certificate((folder.gateway / "server.pem").read_bytes())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["gateway.local", "localhost"]
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.5", "127.0.0.1", "::1"]
    crl = x509.load_pem_x509_crl((folder.gateway / "crl.pem").read_bytes())
    assert len(list(crl)) == 0
    assert crl.next_update_utc == ca.not_valid_after_utc
    assert (server.not_valid_after_utc - server.not_valid_before_utc).days == 397
    assert ca.not_valid_after_utc - server.not_valid_after_utc > dt.timedelta(days=8 * 365)
    assert Registry.load(folder.registry).ids == []
    # Again: nothing changes; for another site: refused.
    before = {path: path.read_bytes() for path in folder.root.rglob("*.pem") if path.name != "crl.pem"}
    assert main(["devices", "init-ca", str(tmp_path / "s"), *arguments]) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert main(["devices", "init-ca", str(tmp_path / "s"), "--site", "bogota", "--broker", "mqtts://g:1"]) == 3


@pytest.mark.parametrize("point", INIT)
def test_making_an_authority_may_be_killed_and_repeated(tmp_path: Path, point: str) -> None:
    arguments = ("init-ca", tmp_path / "s", "--site", "bremen", "--broker", "mqtts://127.0.0.1:1")
    assert command(*arguments, fault=point).returncode == -signal.SIGKILL
    assert command(*arguments).returncode == 0
    authority = Authority(tmp_path / "s")
    for name in OWN:
        assert len(authority.issued(name)) == 1
        pem = authority.folder.identity(name).certificate.read_bytes()
        assert pem == authority.certificate(name)
    assert not list(authority.folder.root.rglob("*.part"))


def test_an_enrolled_device_has_all_it_needs_and_only_its_own_rights(rig: Rig) -> None:
    result = command(*enrolment(rig, "dev-001"), "--owner", "anna", "--profile", "pi-4")
    assert result.returncode == 0, result.stderr
    config = DeviceConfig.load(rig.root / "dev-001" / "device.toml")
    assert (config.site, config.prefix, config.broker) == (SITE.site, SITE.prefix, rig.url)
    assert config.tls is not None
    assert {path.stat().st_mode & 0o777 for path in private_keys(rig.root / "dev-001")} == {0o600}
    certificate = x509.load_pem_x509_certificate(config.tls.certificate.read_bytes())
    assert certificate.subject.rfc4514_string() == "CN=dev-001"
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    entry = Registry.load(rig.folder.registry).entries["dev-001"]
    assert (entry.owner, entry.profile, entry.revoked) == ("anna", "pi-4", False)
    assert entry.key == SigningKey.load(config.device_key).verify_key.text
    client = rig.client("dev-001").connect()
    assert client.publish(SITE.metrics("dev-001")).refused == ""
    assert client.publish(SITE.metrics("dev-002")).refused
    assert audit_log(rig.authority)[-1]["outcome"] == "enrolled"
    assert command(*enrolment(rig, "dev-001")).returncode == 3  # an id is given once


@pytest.mark.parametrize("point", ENROL)
def test_enrolment_may_be_killed_at_any_step_and_repeated(rig: Rig, point: str) -> None:
    assert command(*enrolment(rig, "dev-001"), fault=point).returncode == -signal.SIGKILL
    result = command(*enrolment(rig, "dev-001"), "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["confirmed"]
    assert len(rig.authority.issued("dev-001")) == 1
    assert [line["id"] for line in audit_log(rig.authority)] == ["dev-002", "dev-001"]
    assert not list((rig.folder.authority / "pending").iterdir())
    assert not list(rig.root.rglob("*.part"))
    with Control(rig.url, rig.identity("enroller")) as control:
        assert control.roles_of("dev-001") == ["device-dev-001"]
    assert rig.client("dev-001").connect().publish(SITE.metrics("dev-001")).refused == ""


@pytest.mark.parametrize("topic", ["#", "nothing/of/its/own"], ids=["too much", "too little"])
def test_a_device_that_may_do_the_wrong_things_is_not_admitted(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, topic: str
) -> None:
    wrong = {"acltype": "publishClientSend", "topic": topic, "priority": 0, "allow": True}
    monkeypatch.setattr("devices.enroll.device_acls", lambda *_: [wrong])
    before = rig.broker.pid
    with pytest.raises(ProbeError):
        rig.enroll("dev-001")
    assert "dev-001" not in Registry.load(rig.folder.registry).entries
    (issued,) = rig.authority.issued("dev-001")
    assert rig.authority.is_revoked(issued.serial)
    assert "undone" in audit_log(rig.authority)[-1]["outcome"]
    rig.await_restart(before)
    assert refused_by_tls(rig.client("dev-001").connect)
    monkeypatch.undo()
    rig.enroll("dev-001")  # the id was never really given
    assert rig.client("dev-001").connect().publish(SITE.metrics("dev-001")).refused == ""


def test_a_site_may_be_filled_before_its_broker_runs_for_the_first_time(tmp_path: Path) -> None:
    rig = Rig(tmp_path, devices=("dev-001",))
    with rig:
        assert rig.client("dev-001").connect().publish(SITE.metrics("dev-001")).refused == ""
        assert listens(rig.port)


def test_a_device_may_make_its_own_keys(rig: Rig) -> None:
    box = rig.root / "box"
    assert main(["devices", "request", "dev-001", "--out", str(box)]) == 0
    made = request("dev-001", box)
    keys = {path: path.read_bytes() for path in private_keys(box)}
    assert len(keys) == 2
    result = command(*enrolment(rig, "dev-001"), "--csr", made.csr, "--public-key", made.public_key)
    assert result.returncode == 0, result.stderr
    assert private_keys(rig.root / "dev-001") == []
    for path in keys:
        (rig.root / "dev-001" / path.name).write_bytes(path.read_bytes())
    assert rig.client("dev-001").connect().publish(SITE.metrics("dev-001")).refused == ""
    assert command(*enrolment(rig, "dev-003"), "--csr", made.csr).returncode == 3


def test_only_one_command_at_a_time(rig: Rig) -> None:
    from devices.authority import locked

    with locked(rig.folder), pytest.raises(AuthorityError, match="another command works"):
        rig.enroll("dev-001")


# Renewal


def test_a_certificate_is_renewed_after_two_thirds_of_its_life(rig: Rig) -> None:
    folder, now = rig.root / "dev-002", dt.datetime.now(dt.UTC)
    old = rig.device("dev-002").certificate.read_bytes()
    assert renew(rig.authority, "dev-002", folder, now=now + dt.timedelta(days=260)) is None
    assert rig.device("dev-002").certificate.read_bytes() == old
    issued = renew(rig.authority, "dev-002", folder, now=now + dt.timedelta(days=270))
    assert issued is not None
    assert (issued.ends - now).days >= 270 + 396
    assert rig.device("dev-002").certificate.read_bytes() != old
    with pytest.raises(EnrolError, match="not enrolled"):
        renew(rig.authority, "dev-009", folder)


@pytest.mark.parametrize("point", RENEW)
def test_renewal_may_be_killed_at_any_step_and_repeated(rig: Rig, point: str) -> None:
    arguments = ("renew", "dev-002", "--ca", rig.folder.root, "--out", rig.root / "dev-002")
    (old,) = rig.authority.issued("dev-002")
    key, before = rig.device("dev-002").tls_key.read_bytes(), rig.broker.pid
    assert command(*arguments, "--now", "--new-key", "--replace", fault=point).returncode == -signal.SIGKILL
    result = command(*arguments, "--now", "--new-key", "--replace")
    assert result.returncode == 0, result.stderr
    assert len(rig.authority.issued("dev-002")) == 2
    assert rig.authority.is_revoked(old.serial)
    assert rig.device("dev-002").tls_key.read_bytes() != key
    assert len(private_keys(rig.root / "dev-002")) == 2
    assert [line["action"] for line in audit_log(rig.authority)] == ["enroll", "renew"]
    rig.await_restart(before)
    assert rig.client("dev-002").connect().publish(SITE.metrics("dev-002")).refused == ""


def test_the_gateways_own_identities_are_renewed_while_it_runs(rig: Rig) -> None:
    before = rig.broker.pid
    for name in OWN:
        assert renew(rig.authority, name, early=True, new_key=True) is not None
    rig.await_restart(before)
    assert rig.client("aggregator").connect().publish(SITE.job_topic).refused == ""
    rows = json.loads(command("list", "--ca", rig.folder.root, "--json").stdout)
    assert [row["id"] for row in rows] == [*OWN, "dev-002"]
    assert not any(row["due"] for row in rows)


def test_a_site_must_have_an_encrypted_broker(tmp_path: Path) -> None:
    with pytest.raises(AuthorityError, match="expected mqtts://HOST:PORT"):
        Authority.create(tmp_path, Site.at("bremen", "mqtt://gateway:1883"))
    with pytest.raises(AuthorityError, match="init-ca"):
        Authority(tmp_path / "nothing")


def test_a_refused_id_leaves_nothing_behind(rig: Rig) -> None:
    with pytest.raises(RegistryError, match="is taken"):
        enroll(rig.authority, "dev-002", rig.root / "x", None)  # type: ignore[arg-type]
    assert not list((rig.folder.authority / "pending").iterdir())
    assert not (rig.root / "x").exists()
