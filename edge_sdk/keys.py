"""Ed25519 keys (RFC 8032) in PEM files: sign with one half, verify with the other.

A private key is written with mode 0600 and never leaves the machine that made it; secrets are given by path, never by
value. The files are those of OpenSSL: PKCS #8 and SubjectPublicKeyInfo, which for Ed25519 are a fixed prefix before the 32
bytes of the key (RFC 8410, sections 4, 7 and 10). They are read here, since loading the library's module for all kinds of key
files costs a device 1.2 MB.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge_sdk.errors import KeyFileError

_PRIVATE = ("PRIVATE KEY", bytes.fromhex("302e020100300506032b657004220420"))
_PUBLIC = ("PUBLIC KEY", bytes.fromhex("302a300506032b6570032100"))
_BYTES = 32


@dataclass(frozen=True)
class VerifyKey:
    """The public half of a key."""

    _key: Ed25519PublicKey

    @classmethod
    def load(cls, path: Path) -> VerifyKey:
        """Read a public key from a PEM file. Raises `KeyFileError`."""
        return cls(Ed25519PublicKey.from_public_bytes(_read(path, *_PUBLIC)))

    @classmethod
    def from_text(cls, text: str) -> VerifyKey:
        """The inverse of `text`. Raises `KeyFileError`."""
        try:
            return cls(Ed25519PublicKey.from_public_bytes(base64.b64decode(text, validate=True)))
        except (ValueError, binascii.Error) as error:
            raise KeyFileError(f"{text!r} is not a public key: expected 32 bytes in base64") from error

    @property
    def text(self) -> str:
        """The 32 raw bytes in base64, as registries hold them."""
        return base64.b64encode(self._key.public_bytes_raw()).decode()

    def verify(self, signature: bytes, data: bytes) -> bool:
        """Whether `signature` (64 bytes) was made over `data` by the other half."""
        try:
            self._key.verify(signature, data)
        except InvalidSignature:
            return False
        return True

    def save(self, path: Path) -> None:
        """Write the key as a PEM file."""
        path.write_bytes(_pem(*_PUBLIC, self._key.public_bytes_raw()))


@dataclass(frozen=True)
class SigningKey:
    """The private half of a key."""

    _key: Ed25519PrivateKey

    @classmethod
    def generate(cls, path: Path) -> SigningKey:
        """Make a key and write it, mode 0600. Raises `KeyFileError` where the file exists: keys are never overwritten."""
        key = cls(Ed25519PrivateKey.generate())
        aside = path.with_name(path.name + ".part")  # a key that is half written would be there for ever
        try:
            aside.unlink(missing_ok=True)
            with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(_pem(*_PRIVATE, key._key.private_bytes_raw()))
                file.flush()
                os.fsync(file.fileno())
            os.link(aside, path)
        except FileExistsError as error:
            raise KeyFileError(f"{path}: exists already; a key is never overwritten") from error
        except OSError as error:
            raise KeyFileError(f"{path}: cannot be written ({error.strerror})") from error
        finally:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
        return key

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """Read a private key from a PEM file. Raises `KeyFileError`."""
        return cls(Ed25519PrivateKey.from_private_bytes(_read(path, *_PRIVATE)))

    @property
    def verify_key(self) -> VerifyKey:
        """The public half."""
        return VerifyKey(self._key.public_key())

    def sign(self, data: bytes) -> bytes:
        """The 64-byte signature of `data`."""
        return self._key.sign(data)


def _pem(label: str, prefix: bytes, key: bytes) -> bytes:
    body = base64.b64encode(prefix + key).decode()
    return f"-----BEGIN {label}-----\n{body}\n-----END {label}-----\n".encode()


def _read(path: Path, label: str, prefix: bytes) -> bytes:
    """The 32 bytes of a key."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise KeyFileError(f"{path}: cannot be read ({error.strerror})") from error
    lines = content.decode("ascii", "replace").split("\n")
    inside = "".join(line.strip() for line in lines if not line.startswith("-----"))
    try:
        data = base64.b64decode(inside, validate=True)
    except ValueError:
        data = b""
    begins = f"-----BEGIN {label}-----"
    if (
        begins not in (line.strip() for line in lines)
        or len(data) != len(prefix) + _BYTES
        or not data.startswith(prefix)
    ):
        kind = label.lower()
        raise KeyFileError(
            f"{path}: not an unencrypted Ed25519 {kind} in PEM format; `edgewise devices` makes such keys"
        )
    return data[len(prefix) :]
