"""What the device owes the gateway: one SQLite file, so that nothing trained is lost to a power cut (transport.md, 6.1).

Rules:

1. WAL, `synchronous=FULL`. Entry, body, signed offer, residuals and "this task is done" are one transaction: before it the
   task has not happened, after it the update exists.
2. The offer is signed once and sent again byte for byte.
3. An entry leaves by a verified verdict, by nothing else: an outbox without room makes the device pause, and drops nothing.
4. When the disk is full the transaction rolls back and `StorageError` is raised; what was stored stays.
"""

from __future__ import annotations

import secrets
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_sdk.database import storage_errors, transaction
from edge_sdk.errors import StorageError, TaskError
from edge_sdk.tensors import Array, Tensors, digest, pack, unpack
from edge_sdk.wire import CHUNK, chunk_count, upload_name

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE entry (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, upload TEXT NOT NULL UNIQUE, task TEXT NOT NULL UNIQUE, round INTEGER NOT NULL,
  digest TEXT NOT NULL, size INTEGER NOT NULL, offer BLOB NOT NULL
);
CREATE TABLE body (seq INTEGER NOT NULL, idx INTEGER NOT NULL, bytes BLOB NOT NULL, PRIMARY KEY (seq, idx));
CREATE TABLE done (id INTEGER PRIMARY KEY, task TEXT NOT NULL UNIQUE);
CREATE TABLE feedback (program TEXT PRIMARY KEY, tensors BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE part (digest TEXT PRIMARY KEY, size INTEGER NOT NULL, bitmap BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE quarantine (id INTEGER PRIMARY KEY, upload TEXT NOT NULL, reason TEXT NOT NULL, offer BLOB NOT NULL);
"""
_VERSION = 1
_DONE_KEPT: Final = 1024
_QUARANTINE_KEPT: Final = 16
_DISK_SHARE: Final = 0.2  # of what is free may be owed to the gateway


@dataclass(frozen=True)
class Entry:
    """One update that waits: its name, number, digest (hex64), size in bytes, and the signed offer as it travels."""

    upload: str
    seq: int
    task: str
    round: int
    digest: str
    size: int
    offer: bytes

    @property
    def chunks(self) -> int:
        """How many chunks its body has."""
        return chunk_count(self.size)


@dataclass(frozen=True)
class Draft:
    """What an offer says about a body that is about to be stored."""

    upload: str
    outbox_id: str
    seq: int
    digest: str
    size: int


@dataclass(frozen=True)
class Summary:
    """What waits, and what became of the rest, since the database was made. `dropped` stays 0 as long as rule 3 holds."""

    entries: int
    bytes: int
    oldest_round: int
    made: int
    accepted: int
    rejected: int
    dropped: int


class Outbox:
    """The outbox of one device. Safe to use from several threads. Raises `StorageError` if the file cannot be used."""

    def __init__(self, path: Path, *, max_entries: int = 256, max_bytes: int = 256 << 20) -> None:
        self._path = path
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA cache_size=-256")  # KiB; rows are read once, the system caches the file
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
        except (sqlite3.Error, OSError) as error:
            raise StorageError(f"{path}: the outbox cannot be opened ({error})") from error
        if version not in (0, _VERSION):
            raise StorageError(f"{path}: schema version {version}, this Edgewise writes {_VERSION}: upgrade edgewise")
        if version == 0:
            with self._transaction():
                for statement in _SCHEMA.split(";\n"):
                    if statement.strip():
                        self._db.execute(statement)
                self._db.execute("INSERT INTO meta VALUES ('outbox_id', ?)", (secrets.token_hex(8),))
                self._db.execute(f"PRAGMA user_version={_VERSION}")
        self.outbox_id = self.meta("outbox_id") or ""

    def commit(
        self,
        *,
        task: str,
        number: int,
        program: str,
        body: bytes,
        feedback: Tensors,
        sign: Callable[[Draft], bytes],
    ) -> Entry:
        """Store an update and mark its task done, all or nothing. `number` is its round; `sign` makes the signed offer.

        Raises `TaskError` if the task was done before, `StorageError` if there is no room.
        """
        name = digest(body)
        with self._lock, self._transaction():
            if self._done(task):
                raise TaskError(f"task {task} was done before: its update is stored or answered")
            row = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name='entry'").fetchone()
            seq = 1 if row is None else int(row[0]) + 1
            draft = Draft(upload_name(self.outbox_id, seq, name), self.outbox_id, seq, name, len(body))
            offer = sign(draft)
            self._db.execute(
                "INSERT INTO entry VALUES (?, ?, ?, ?, ?, ?, ?)",
                (seq, draft.upload, task, number, name, len(body), offer),
            )
            for index in range(chunk_count(len(body))):
                part = body[index * CHUNK : (index + 1) * CHUNK]
                self._db.execute("INSERT INTO body VALUES (?, ?, ?)", (seq, index, part))
            self._mark_done(task)
            if feedback:
                self._db.execute("INSERT OR REPLACE INTO feedback VALUES (?, ?)", (program, pack(feedback)))
            self._count("made")
        return Entry(draft.upload, seq, task, number, name, len(body), offer)

    def entries(self) -> list[Entry]:
        """Everything that waits, oldest first."""
        with self._reading():
            rows = self._db.execute("SELECT upload, seq, task, round, digest, size, offer FROM entry ORDER BY seq")
            return [Entry(*row) for row in rows]

    def chunk(self, upload: str, index: int) -> bytes | None:
        """One chunk of a body, None if it is not here."""
        with self._reading():
            row = self._db.execute(
                "SELECT bytes FROM body JOIN entry USING (seq) WHERE upload=? AND idx=?", (upload, index)
            ).fetchone()
        return None if row is None else bytes(row[0])

    def delete(self, upload: str, fate: str) -> bool:
        """Forget an entry: `fate` is `accepted` or `rejected`, and is counted. False if it was not here."""
        with self._lock, self._transaction():
            row = self._db.execute("SELECT seq FROM entry WHERE upload=?", (upload,)).fetchone()
            if row is None:
                return False
            self._db.execute("DELETE FROM entry WHERE seq=?", row)
            self._db.execute("DELETE FROM body WHERE seq=?", row)
            self._count(fate)
        return True

    def quarantine(self, upload: str, reason: str) -> bool:
        """Forget an entry but keep its offer for diagnosis: the sixteen newest are kept."""
        with self._lock, self._transaction():
            row = self._db.execute("SELECT seq, offer FROM entry WHERE upload=?", (upload,)).fetchone()
            if row is None:
                return False
            self._db.execute(
                "INSERT INTO quarantine (upload, reason, offer) VALUES (?, ?, ?)", (upload, reason, row[1])
            )
            self._db.execute(
                "DELETE FROM quarantine WHERE id NOT IN (SELECT id FROM quarantine ORDER BY id DESC LIMIT ?)",
                (_QUARANTINE_KEPT,),
            )
            self._db.execute("DELETE FROM entry WHERE seq=?", row[:1])
            self._db.execute("DELETE FROM body WHERE seq=?", row[:1])
            self._count("rejected")
        return True

    def quarantined(self) -> list[tuple[str, str]]:
        """(upload, reason) of what is kept for diagnosis."""
        with self._reading():
            return list(self._db.execute("SELECT upload, reason FROM quarantine ORDER BY id"))

    def task_done(self, task: str) -> bool:
        """Whether this task was done before; it is never done twice."""
        with self._reading():
            return self._done(task)

    def has_room(self, size: int) -> bool:
        """Whether an update of so many bytes may be made: entries, bytes, and a fifth of the free disk."""
        waiting = self.summary()
        try:
            free = shutil.disk_usage(self._path.parent).free
        except OSError:
            return False
        return (
            waiting.entries < self._max_entries
            and waiting.bytes + size <= self._max_bytes
            and size + CHUNK <= _DISK_SHARE * free
        )

    def summary(self) -> Summary:
        """Counts and bytes."""
        with self._reading():
            row = self._db.execute("SELECT count(*), coalesce(sum(size), 0), coalesce(min(round), 0) FROM entry")
            entries, size, oldest = row.fetchone()
            names = ("made", "accepted", "rejected", "dropped")
            counts = [int(self._meta(f"count.{name}") or 0) for name in names]
        return Summary(int(entries), int(size), int(oldest), *counts)

    def feedback(self, program: str) -> dict[str, Array]:
        """The residuals that the last update of this program left behind."""
        with self._reading():
            row = self._db.execute("SELECT tensors FROM feedback WHERE program=?", (program,)).fetchone()
        return {} if row is None else unpack(bytes(row[0]))[0]

    def meta(self, key: str) -> str | None:
        """A named value."""
        with self._reading():
            return self._meta(key)

    def set_meta(self, key: str, value: str) -> None:
        """Write a named value."""
        with self._lock, self._transaction():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    # Downloads: which chunks of a blob are on disk (edge_sdk.downloads).

    def part(self, name: str) -> tuple[int, bytes] | None:
        """(size, bitmap) of a blob that is being fetched."""
        with self._reading():
            row = self._db.execute("SELECT size, bitmap FROM part WHERE digest=?", (name,)).fetchone()
        return None if row is None else (int(row[0]), bytes(row[1]))

    def save_part(self, name: str, size: int, bitmap: bytes) -> None:
        """Remember which chunks are on disk; called after they are."""
        with self._lock, self._transaction():
            self._db.execute("INSERT OR REPLACE INTO part VALUES (?, ?, ?)", (name, size, bitmap))

    def drop_part(self, name: str) -> None:
        """Forget a blob that is being fetched."""
        with self._lock, self._transaction():
            self._db.execute("DELETE FROM part WHERE digest=?", (name,))

    def parts(self) -> list[str]:
        """The digests of the blobs that are being fetched."""
        with self._reading():
            return [row[0] for row in self._db.execute("SELECT digest FROM part ORDER BY digest")]

    def limit_pages(self, pages: int | None) -> None:
        """Let SQLite refuse to grow beyond so many pages (None: no limit), as a full disk would."""
        with self._reading():
            self._db.execute(f"PRAGMA max_page_count={pages or 1_073_741_823:d}")

    def pages(self) -> int:
        """The size of the file in pages."""
        with self._reading():
            return int(self._db.execute("PRAGMA page_count").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def _meta(self, key: str) -> str | None:
        row = self._db.execute("SELECT value FROM meta WHERE key=?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def _done(self, task: str) -> bool:
        return self._db.execute("SELECT 1 FROM done WHERE task=?", (task,)).fetchone() is not None

    def _count(self, name: str) -> None:
        self._db.execute(
            "INSERT INTO meta VALUES (?, '1') ON CONFLICT (key) DO UPDATE SET value=CAST(value AS INTEGER)+1",
            (f"count.{name}",),
        )

    def _mark_done(self, task: str) -> None:
        self._db.execute("INSERT INTO done (task) VALUES (?)", (task,))
        self._db.execute("DELETE FROM done WHERE id<=(SELECT max(id) FROM done)-?", (_DONE_KEPT,))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._lock, storage_errors(self._path, "the outbox cannot be read"):
            yield

    def _transaction(self) -> AbstractContextManager[None]:
        return transaction(self._db, self._path, "the outbox cannot be written")
