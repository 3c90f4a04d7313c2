"""A folder of immutable files named by their SHA-256: the models that devices fetch, chunk by chunk.

Rules: a file appears under its name only when all of its bytes are on disk (write aside, `fsync`, rename,
`fsync` of the folder); names are digests and nothing else, so no request can leave the folder; nothing is
overwritten.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Collection
from pathlib import Path

from edge_sdk.errors import StorageError
from edge_sdk.tensors import digest as digest_of

log = logging.getLogger(__name__)
DIGEST = r"[0-9a-f]{64}"


class DiskFullError(StorageError):
    """Nothing was written because the disk is full."""


class BlobStore:
    """Content-addressed files below `folder` (made if absent)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("*.tmp"):  # of a process that was killed in `put`
            leftover.unlink(missing_ok=True)

    def put(self, data: bytes) -> str:
        """Store `data` and return its digest (hex64). Raises `DiskFullError`, or `StorageError` when the disk refuses."""
        digest = digest_of(data)
        target = self._folder / digest
        if target.exists():
            return digest
        aside = self._folder / f"{digest}.tmp"
        try:
            write_through(aside, data)
            aside.rename(target)
            sync_folder(self._folder)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise storage_error(f"{target}: cannot store {len(data)} bytes ({error.strerror})", error) from error
        return digest

    def size(self, digest: str) -> int | None:
        """Bytes of a blob, or None if it is not here."""
        try:
            return self.path(digest).stat().st_size
        except OSError:
            return None

    def path(self, digest: str) -> Path:
        """The file of a blob, which may not be here. Raises `StorageError` for a name that is no digest."""
        if not re.fullmatch(DIGEST, digest):
            raise StorageError(f"{digest[:80]!r} is not a digest: 64 hexadecimal digits were expected")
        return self._folder / digest

    def read(self, digest: str) -> bytes:
        """The whole blob, checked against its name. Raises `StorageError` if it is absent or was changed."""
        path = self.path(digest)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StorageError(f"{path}: cannot read this model: {error}; restore the state folder") from error
        if digest_of(data) != digest:
            raise StorageError(f"{path}: the bytes do not match the file's name; restore the state folder")
        return data

    def chunk(self, digest: str, index: int, size: int) -> bytes | None:
        """Bytes `[index * size, (index + 1) * size)`, shorter at the end; None outside it."""
        try:
            with self.path(digest).open("rb") as file:
                file.seek(index * size)
                return file.read(size) or None
        except (OSError, ValueError, OverflowError):
            return None

    def prune(self, keep: Collection[str]) -> None:
        """Delete every blob whose digest is not in `keep`."""
        for path in self._folder.iterdir():
            if path.name not in keep:
                path.unlink(missing_ok=True)


def storage_error(told: str, error: OSError) -> StorageError:
    """`error` as what it means to a caller: a full disk is worth waiting for, anything else is not."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"{told}; free some disk space")
    return StorageError(f"{told}; check the disk and the rights of the folder")


def write_through(path: Path, data: bytes) -> None:
    """Write a file and wait until its bytes are on disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
