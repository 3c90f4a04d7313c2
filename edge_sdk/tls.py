"""Mutual TLS towards the broker: which files, which checks, and what a device does whose clock is wrong.

Rules (transport.md, section 9 (iii)):

1. TLS 1.2 or later. The chain and the host name are always checked.
2. OpenSSL compares certificates with the wall clock, and a device may believe that it is 1970. Where the wall clock lies
   before a moment that is known to have passed (the floor: the start of the pinned CA's life, or the last gateway time
   seen), OpenSSL is told not to compare, and the certificate of the broker is compared here with the floor instead: it must
   end later. When it began is then not asked.
3. The files are read at every connection, so a renewed certificate needs no restart.
"""

from __future__ import annotations

import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_sdk.errors import LinkError

NO_CHECK_TIME: Final = 0x200000  # X509_V_FLAG_NO_CHECK_TIME, for which Python's ssl module has no name


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: the CA that is believed, our certificate, and its private key."""

    ca: Path
    certificate: Path
    key: Path


class _FloorContext(ssl.SSLContext):
    """A context that knows a moment (Unix seconds) that has passed, whatever the clock says."""

    floor: int = 0


class _FloorSocket(ssl.SSLSocket):
    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        assert isinstance(self.context, _FloorContext)
        certificate = self.getpeercert() or {}
        ends = str(certificate.get("notAfter", ""))
        if not ends or ssl.cert_time_to_seconds(ends) <= self.context.floor:
            known = time.strftime("%Y-%m-%d %H:%M", time.gmtime(self.context.floor))
            raise ssl.SSLCertVerificationError(f"the broker's certificate ended at {ends}; it is later than {known}")


def client_context(files: TlsFiles, floor: int = 0) -> ssl.SSLContext:
    """The context of one connection; `floor` in Unix seconds. Raises `LinkError` naming the file that cannot be used."""
    context = _FloorContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cafile=files.ca)
    except (OSError, ssl.SSLError) as error:
        raise LinkError(f"{files.ca}: no CA certificate in PEM format can be read ({error})") from error
    try:
        context.load_cert_chain(files.certificate, files.key)
    except (OSError, ssl.SSLError) as error:
        raise LinkError(
            f"{files.certificate} and {files.key}: not a certificate and its private key ({error})"
        ) from error
    context.floor = max([floor, *(_begin(certificate) for certificate in context.get_ca_certs())])
    if time.time() < context.floor:
        context.verify_flags |= NO_CHECK_TIME
        context.sslsocket_class = _FloorSocket
    return context


def _begin(certificate: object) -> int:
    assert isinstance(certificate, dict)
    return int(ssl.cert_time_to_seconds(certificate["notBefore"]))
