"""Blobs that the device fetches chunk by chunk: models, by digest (transport.md, section 5).

A bitmap bit never precedes its bytes: chunks are written, then `fdatasync`, then the bitmap is committed (to the outbox's
database), a window at a time. A file appears under its digest only when its SHA-256 is right and all of it is on disk.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_sdk import faults
from edge_sdk.errors import StorageError
from edge_sdk.outbox import Outbox
from edge_sdk.wire import CHUNK, WINDOW, chunk_count


class Downloads:
    """The blobs of one device, in `folder` (made if absent)."""

    def __init__(self, folder: Path, outbox: Outbox) -> None:
        self._folder, self._outbox = folder, outbox
        self._fresh: dict[str, set[int]] = {}  # on disk, not yet in the bitmap
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{folder}: cannot be made ({error.strerror})") from error
        for name in outbox.parts():
            if not self._part(name).exists():  # the rename was done, the row was not deleted; or somebody cleaned up
                outbox.drop_part(name)

    def path(self, digest: str) -> Path | None:
        """The file of a complete blob, None if it is not here."""
        path = self._folder / digest
        return path if path.is_file() else None

    def put(self, digest: str, data: bytes) -> None:
        """Store a blob that the device made itself."""
        aside = self._folder / f"{digest}.new"
        with _writing(aside):
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self._rename(aside, digest)

    def missing(self, digest: str, size: int) -> frozenset[int]:
        """The chunk indexes that are still to be fetched of a blob of `size` bytes; empty if it is complete."""
        if self.path(digest) is not None:
            return frozenset()
        known = self._outbox.part(digest)
        everything = frozenset(range(chunk_count(size)))
        if known is None or known[0] != size or not self._part(digest).exists():
            return everything
        return frozenset(i for i in everything if not known[1][i // 8] >> (i % 8) & 1) - self._fresh.get(digest, set())

    def store(self, digest: str, size: int, index: int, data: bytes) -> bool:
        """Write one chunk. False if it does not belong: wrong index or length. Raises `StorageError`."""
        chunks = chunk_count(size)
        expected = size - (chunks - 1) * CHUNK if index == chunks - 1 else CHUNK
        if not 0 <= index < chunks or len(data) != expected:
            return False
        with _writing(self._part(digest)):
            if not self._part(digest).exists():
                with self._part(digest).open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, size)
                self._outbox.save_part(digest, size, bytes(-(-chunks // 8)))
            with self._part(digest).open("r+b") as file:
                file.seek(index * CHUNK)
                file.write(data)
        self._fresh.setdefault(digest, set()).add(index)
        if len(self._fresh[digest]) >= WINDOW or not self.missing(digest, size):
            self._flush(digest, size)
        return True

    def finish(self, digest: str) -> bool:
        """Check a blob whose chunks are all here and give it its name. False, and everything dropped, if its SHA-256 is wrong."""
        part = self._part(digest)
        with _writing(part):
            renamed = self.path(digest) is not None  # by an earlier call that could not write the rest
            with (self._folder / digest if renamed else part).open("rb") as file:
                right = hashlib.file_digest(file, "sha256").hexdigest() == digest
                if right:
                    os.fsync(file.fileno())
            if right and not renamed:
                faults.point("D9")
                self._rename(part, digest)
                faults.point("D10")
            elif not right:
                part.unlink(missing_ok=True)
        self._fresh.pop(digest, None)
        self._outbox.drop_part(digest)
        return right

    def prune(self, keep: Collection[str]) -> None:
        """Delete every complete blob whose digest is not in `keep`, and every unfinished one."""
        for path in self._folder.iterdir():
            if path.name not in keep and path.name.removesuffix(".part") not in keep:
                path.unlink(missing_ok=True)
        for name in self._outbox.parts():
            if name not in keep:
                self._outbox.drop_part(name)

    def _flush(self, digest: str, size: int) -> None:
        with _writing(self._part(digest)), self._part(digest).open("r+b") as file:
            os.fdatasync(file.fileno())
        faults.point("D8")
        known = self._outbox.part(digest)
        bitmap = bytearray(known[1] if known else bytes(-(-chunk_count(size) // 8)))
        for index in self._fresh.pop(digest, set()):
            bitmap[index // 8] |= 1 << (index % 8)
        self._outbox.save_part(digest, size, bytes(bitmap))

    def _part(self, digest: str) -> Path:
        return self._folder / f"{digest}.part"

    def _rename(self, source: Path, digest: str) -> None:
        source.rename(self._folder / digest)
        handle = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror}); free some disk space") from error
