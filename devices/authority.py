"""A site's certificate authority: keys, certificates, revocation list, each a file that is written whole or not at all.

Rules (transport.md, section 11):

1. A client's common name is its device id, `[a-z0-9][a-z0-9-]{0,31}` and not reserved. This is the only place that can
   refuse another name: a broker that takes identities as user names lets `#` and `dev-001/evil` in.
2. A request's subject is not read. Of a request only the public key is used, once it has proved that its owner has the
   private one.
3. Leaves live 397 days and are due for renewal after two thirds of that; the CA lives ten years. A device whose clock is
   wrong compares with a moment that the CA's own life gives it, so the CA must outlive its leaves.
4. The revocation list is there from the beginning, for the broker does not start without it, and never runs out before
   the CA does: a forgotten renewal of the list must not lock a whole plant out.
5. Keys are EC P-256, made where they are used, mode 0600, and never overwritten by accident.

The files (`Folder`):

    authority/ca.key, ca.pem      whoever has the key can admit anybody: keep it offline where you can
    authority/enroller.*          the identity that writes the broker's roles
    authority/site.json           site, prefix, broker address, host names
    authority/issued/ID.SERIAL.pem, revoked.json, pending/, audit.jsonl, lock
    gateway/ca.pem, crl.pem, server.*, aggregator.*    what the gateway needs: `security.folder` of the job file
    devices.json                  the registry
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import ipaddress
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from devices.registry import check_id
from edge_sdk import faults
from edge_sdk.errors import EdgewiseError
from edge_sdk.tls import TlsFiles
from edge_sdk.wire import AGGREGATOR, ENROLLER, Address

SERVER: Final = "server"
OWN: Final = (SERVER, AGGREGATOR, ENROLLER)  # the identities of the gateway's side
LEAF_LIFE: Final = dt.timedelta(days=397)
CA_LIFE: Final = dt.timedelta(days=3653)
_EARLIER: Final = dt.timedelta(hours=1)  # for clocks that are a little behind


class AuthorityError(EdgewiseError):
    """The authority's folder, a request or a name is not what it must be."""


@dataclass(frozen=True)
class Site:
    """What every identity of a site shares: names in topics, the broker's address, names in its certificate."""

    site: str
    prefix: str
    broker: str
    hosts: tuple[str, ...]

    @classmethod
    def at(cls, site: str, broker: str, *, prefix: str = "", hosts: Sequence[str] = ()) -> Site:
        """A site whose broker also answers on its own machine; `hosts` are further names of it."""
        host = urlsplit(broker).hostname
        names = dict.fromkeys([*([host] if host else []), *hosts, "localhost", "127.0.0.1", "::1"])
        return cls(site, prefix, broker, tuple(names))


@dataclass(frozen=True)
class Folder:
    """Where everything lies."""

    root: Path

    @property
    def authority(self) -> Path:
        """The CA's own."""
        return self.root / "authority"

    @property
    def gateway(self) -> Path:
        """What the gateway needs."""
        return self.root / "gateway"

    @property
    def registry(self) -> Path:
        """The devices."""
        return self.root / "devices.json"

    def identity(self, name: str) -> TlsFiles:
        """The files of one of `OWN`."""
        place = self.authority if name == ENROLLER else self.gateway
        return TlsFiles(self.authority / "ca.pem", place / f"{name}.pem", place / f"{name}.key")


@dataclass(frozen=True)
class Issued:
    """A certificate that was given out."""

    id: str
    serial: int
    begins: dt.datetime
    ends: dt.datetime

    @classmethod
    def read(cls, name: str, path: Path) -> Issued:
        """The certificate in a file. Raises `AuthorityError`."""
        held = _load_certificate(path)
        return cls(name, held.serial_number, held.not_valid_before_utc, held.not_valid_after_utc)

    @property
    def due(self) -> dt.datetime:
        """When it should be renewed."""
        return self.begins + (self.ends - self.begins) * 2 / 3


class Authority:
    """The authority in `root`; only one process works with it at a time (`locked`)."""

    def __init__(self, root: Path) -> None:
        """Open it. Raises `AuthorityError` where `create` has not finished."""
        self.folder = Folder(root)
        path = self.folder.authority / "site.json"
        try:
            content = json.loads(path.read_bytes())
            self.site = Site(**{**content, "hosts": tuple(content["hosts"])})
        except OSError as error:
            raise AuthorityError(
                f"{path}: cannot be read ({error.strerror}); `edgewise devices init-ca` makes it"
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            raise AuthorityError(f"{path}: not what `edgewise devices init-ca` writes: {error}") from error
        self._key = _load_key(self.folder.authority / "ca.key")
        self._certificate = _load_certificate(self.folder.authority / "ca.pem")

    @classmethod
    def create(cls, root: Path, site: Site, *, now: dt.datetime | None = None) -> Authority:
        """Make CA, empty revocation list, and the gateway's identities; what is there already stays as it is.

        Raises `AuthorityError` where the folder belongs to another site, or a name or address is none.
        """
        now = now or _now()
        _check(site)
        folder = Folder(root)
        (folder.authority / "issued").mkdir(parents=True, exist_ok=True, mode=0o700)
        (folder.authority / "pending").mkdir(exist_ok=True, mode=0o700)
        folder.gateway.mkdir(exist_ok=True, mode=0o700)
        known = folder.authority / "site.json"
        if known.exists() and json.loads(known.read_bytes()) != json.loads(json.dumps(asdict(site))):
            raise AuthorityError(f"{known}: this authority is that of another site or address: choose another folder")
        with locked(folder):
            key = make_key(folder.authority / "ca.key")
            faults.point("I1")
            if not (folder.authority / "ca.pem").exists():
                write(folder.authority / "ca.pem", _self_signed(key, site.site, now))
            faults.point("I2")
            write(folder.gateway / "ca.pem", (folder.authority / "ca.pem").read_bytes())
            write(known, json.dumps(asdict(site)).encode())
            made = cls(root)
            made.write_crl(now=now)
            faults.point("I3")
            for name in OWN:
                files = folder.identity(name)
                public = make_key(files.key).public_key()
                if not files.certificate.exists():
                    if not made.issued(name):
                        made.issue(name, public, new_serial(), now=now)
                    write(files.certificate, made.certificate(name))
                faults.point("I4")
            if not folder.registry.exists():
                write(folder.registry, b'{"devices": []}\n')
        return made

    def issue(
        self,
        name: str,
        public: ec.EllipticCurvePublicKey,
        serial: int,
        *,
        now: dt.datetime | None = None,
        life: dt.timedelta = LEAF_LIFE,
    ) -> bytes:
        """A certificate (PEM) with common name `name`; the same again if this serial was issued before.

        Raises `RegistryError` for a name that no client may have, `AuthorityError` for a serial that another key has.
        """
        if name not in OWN:
            check_id(name)
        path = self._issued(name, serial)
        if path.exists():
            if _load_certificate(path).public_key() != public:
                raise AuthorityError(f"{path}: was given to another key: revoke {name!r}")
            return path.read_bytes()
        builder = _leaf(name, public, serial, now or _now(), life).issuer_name(self._certificate.subject)
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
        )
        if name == SERVER:
            names: list[x509.GeneralName] = [_host(host) for host in self.site.hosts]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        pem = _pem(builder.sign(self._key, hashes.SHA256()))
        write(path, pem)
        return pem

    def certificate(self, name: str) -> bytes:
        """The certificate of a name that ends last, in PEM. Raises `AuthorityError` where there is none."""
        issued = self.issued(name)
        if not issued:
            raise AuthorityError(f"{self.folder.authority}: no certificate was issued to {name!r}")
        return self._issued(name, issued[-1].serial).read_bytes()

    def issued(self, name: str) -> list[Issued]:
        """All certificates of a name, the one that ends last at the end."""
        found = [Issued.read(name, path) for path in (self.folder.authority / "issued").glob(f"{name}.*.pem")]
        return sorted(found, key=lambda one: (one.ends, one.begins))

    def has_issued(self, name: str, serial: int) -> bool:
        """Whether this certificate was given out."""
        return self._issued(name, serial).exists()

    def is_revoked(self, serial: int) -> bool:
        """Whether a serial is on the list."""
        return format(serial, "x") in self._revoked()

    def revoke(self, serials: Sequence[int], *, now: dt.datetime | None = None) -> None:
        """Put serials on the list and write it, where the gateway's broker will see it."""
        moment = int((now or _now()).timestamp())
        held = self._revoked() | {}
        for serial in serials:
            held.setdefault(format(serial, "x"), moment)
        write(self.folder.authority / "revoked.json", json.dumps(held).encode())
        faults.point("C1")
        self.write_crl(now=now)

    def write_crl(self, *, now: dt.datetime | None = None) -> None:
        """Write the revocation list, unless it says just this already: a new one restarts the broker."""
        now, path = now or _now(), self.folder.gateway / "crl.pem"
        if path.exists() and _load_crl(path) == (self._certificate.subject, set(self._revoked())):
            return
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._certificate.subject)
            .last_update(now - _EARLIER)
            .next_update(self._certificate.not_valid_after_utc)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .add_extension(x509.CRLNumber(int(now.timestamp() * 1000)), critical=False)
        )
        for serial, moment in self._revoked().items():
            at = dt.datetime.fromtimestamp(moment, dt.UTC)
            row = x509.RevokedCertificateBuilder().serial_number(int(serial, 16)).revocation_date(at).build()
            builder = builder.add_revoked_certificate(row)
        signed = builder.sign(self._key, hashes.SHA256())
        write(path, signed.public_bytes(serialization.Encoding.PEM))

    def _revoked(self) -> dict[str, int]:
        with contextlib.suppress(FileNotFoundError):
            return dict(json.loads((self.folder.authority / "revoked.json").read_bytes()))
        return {}

    def _issued(self, name: str, serial: int) -> Path:
        return self.folder.authority / "issued" / f"{name}.{serial:x}.pem"


@contextlib.contextmanager
def locked(folder: Folder) -> Iterator[None]:
    """One process at a time. Raises `AuthorityError` while another holds it."""
    with (folder.authority / "lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise AuthorityError(
                f"{folder.authority}: another command works with this authority: wait for it"
            ) from error
        yield


def new_serial() -> int:
    """A serial number that nobody can guess (RFC 5280, section 4.1.2.2: positive, at most 20 bytes)."""
    return secrets.randbits(127) + 1


def make_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The TLS key in `path` (PKCS #8, mode 0600); made if it is not there."""
    if path.exists():
        return _load_key(path)
    key = ec.generate_private_key(ec.SECP256R1())
    write(
        path,
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        mode=0o600,
    )
    return key


def make_request(name: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    """A certificate signing request (PEM): the proof that its maker has the private key."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def read_request(path: Path) -> ec.EllipticCurvePublicKey:
    """The public key of a request; its subject is not looked at. Raises `AuthorityError`."""
    try:
        request = x509.load_pem_x509_csr(path.read_bytes())
    except (OSError, ValueError) as error:
        raise AuthorityError(f"{path}: no certificate signing request in PEM format ({error})") from error
    public = request.public_key()
    if not request.is_signature_valid:
        raise AuthorityError(f"{path}: the request is not signed by the key in it")
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
        raise AuthorityError(f"{path}: the key must be EC P-256; `edgewise devices request` makes such a request")
    return public


def write(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write a file whole or not at all. Raises `AuthorityError`."""
    aside = path.with_name(path.name + ".part")
    try:
        aside.unlink(missing_ok=True)
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise AuthorityError(f"{path}: cannot be written ({error.strerror})") from error


def _check(site: Site) -> None:
    Address(site.prefix, site.site, "any")
    parts = urlsplit(site.broker)
    if parts.scheme != "mqtts" or not parts.hostname or parts.port is None:
        raise AuthorityError(f"the broker's address is {site.broker!r}, expected mqtts://HOST:PORT")
    for host in site.hosts:
        _host(host)


def _host(host: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise AuthorityError(f"host name {host!r}: {error}") from error


def _leaf(
    name: str, public: ec.EllipticCurvePublicKey, serial: int, now: dt.datetime, life: dt.timedelta
) -> x509.CertificateBuilder:
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if name == SERVER else ExtendedKeyUsageOID.CLIENT_AUTH
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .public_key(public)
        .serial_number(serial)
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + life)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(leaf=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _self_signed(key: ec.EllipticCurvePrivateKey, site: str, now: dt.datetime) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Edgewise site {site}")])
    public = key.public_key()
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(leaf=False), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )
    return _pem(builder.sign(key, hashes.SHA256()))


def _usage(*, leaf: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=leaf,
        key_cert_sign=not leaf,
        crl_sign=not leaf,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise AuthorityError(f"{path}: no unencrypted private key in PEM format ({error})") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise AuthorityError(f"{path}: not an EC key")
    return key


def _load_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise AuthorityError(f"{path}: no certificate in PEM format ({error})") from error


def _load_crl(path: Path) -> tuple[x509.Name, set[str]] | None:
    """Issuer and serials of a list; None for a file that is none."""
    try:
        held = x509.load_pem_x509_crl(path.read_bytes())
    except ValueError:
        return None
    return held.issuer, {format(row.serial_number, "x") for row in held}


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC).replace(microsecond=0)
