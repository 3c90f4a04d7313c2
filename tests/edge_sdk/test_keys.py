"""Key files are those of OpenSSL, and nothing else is taken for one."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from edge_sdk.errors import KeyFileError
from edge_sdk.keys import SigningKey, VerifyKey

PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
SPKI, OPEN = serialization.PublicFormat.SubjectPublicKeyInfo, serialization.NoEncryption()


def test_the_files_are_the_librarys_own_byte_for_byte(tmp_path: Path) -> None:
    private, public = tmp_path / "a.key", tmp_path / "a.pub"
    key = SigningKey.generate(private)
    key.verify_key.save(public)
    loaded = serialization.load_pem_private_key(private.read_bytes(), None)
    assert loaded.private_bytes(PEM, PKCS8, OPEN) == private.read_bytes()
    assert loaded.public_key().public_bytes(PEM, SPKI) == public.read_bytes()


def test_keys_that_the_library_wrote_are_read(tmp_path: Path) -> None:
    private, public = tmp_path / "a.key", tmp_path / "a.pub"
    made = ed25519.Ed25519PrivateKey.generate()
    private.write_bytes(made.private_bytes(PEM, PKCS8, OPEN).replace(b"\n", b"\r\n"))
    public.write_bytes(made.public_key().public_bytes(PEM, SPKI))
    signature = SigningKey.load(private).sign(b"offer")
    assert VerifyKey.load(public).verify(signature, b"offer")
    assert not VerifyKey.load(public).verify(signature, b"another")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"-----BEGIN PRIVATE KEY-----\n!!!\n-----END PRIVATE KEY-----\n",
        ec.generate_private_key(ec.SECP256R1()).private_bytes(PEM, PKCS8, OPEN),
        ed25519.Ed25519PrivateKey.generate().private_bytes(PEM, PKCS8, serialization.BestAvailableEncryption(b"x")),
        ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(PEM, SPKI),
    ],
    ids=["empty", "no text", "no base64", "another curve", "encrypted", "a public key"],
)
def test_another_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "wrong.key"
    path.write_bytes(content)
    with pytest.raises(KeyFileError, match=r"wrong\.key: not an unencrypted Ed25519 private key"):
        SigningKey.load(path)


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    SigningKey.generate(path)
    before = path.read_bytes()
    with pytest.raises(KeyFileError, match="never overwritten"):
        SigningKey.generate(path)
    assert path.read_bytes() == before
    assert path.stat().st_mode & 0o777 == 0o600
