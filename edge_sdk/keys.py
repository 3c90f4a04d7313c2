"""Ed25519 keys in PEM files (RFC 8032; PKCS #8 and SubjectPublicKeyInfo): sign with one half, verify with the other.

A private key is written with mode 0600 and never leaves the machine that made it; secrets are given by path, never by
value.
"""

from __future__ import annotations

import base64
import binascii
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge_sdk.errors import KeyFileError


@dataclass(frozen=True)
class VerifyKey:
    """The public half of a key."""

    _key: Ed25519PublicKey

    @classmethod
    def load(cls, path: Path) -> VerifyKey:
        """Read a public key from a PEM file. Raises `KeyFileError`."""
        try:
            key = serialization.load_pem_public_key(_read(path))
        except (ValueError, UnsupportedAlgorithm) as error:
            raise KeyFileError(f"{path}: not a public key in PEM format") from error
        if not isinstance(key, Ed25519PublicKey):
            raise KeyFileError(f"{path}: expected an Ed25519 public key, found {type(key).__name__}")
        return cls(key)

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
        pem = self._key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        path.write_bytes(pem)


@dataclass(frozen=True)
class SigningKey:
    """The private half of a key."""

    _key: Ed25519PrivateKey

    @classmethod
    def generate(cls, path: Path) -> SigningKey:
        """Make a key and write it, mode 0600. Raises `KeyFileError` where the file exists: keys are never overwritten."""
        key = cls(Ed25519PrivateKey.generate())
        pem = key._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError as error:
            raise KeyFileError(f"{path}: exists already; a key is never overwritten") from error
        except OSError as error:
            raise KeyFileError(f"{path}: cannot be written ({error.strerror})") from error
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        return key

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """Read a private key from a PEM file. Raises `KeyFileError`."""
        try:
            key = serialization.load_pem_private_key(_read(path), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise KeyFileError(f"{path}: not an unencrypted private key in PEM format") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise KeyFileError(f"{path}: expected an Ed25519 private key, found {type(key).__name__}")
        return cls(key)

    @property
    def verify_key(self) -> VerifyKey:
        """The public half."""
        return VerifyKey(self._key.public_key())

    def sign(self, data: bytes) -> bytes:
        """The 64-byte signature of `data`."""
        return self._key.sign(data)


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise KeyFileError(f"{path}: cannot be read ({error.strerror})") from error
    return content
