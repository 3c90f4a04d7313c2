"""What the gateway must not forget: one SQLite file, and the truth after a crash (transport.md, section 6.2).

Rules
-----
1. WAL, `synchronous=FULL`, one connection, one thread. All writes happen inside `transaction()`: either all
   of a batch is on disk or none of it.
2. The ledger's primary key `(device, outbox_id, seq)` makes a second acceptance impossible, its
   `UNIQUE(device, task)` a second vote.
3. The parts of an upload become the body of the update, uncopied, and are read row by row.
4. A ledger row ends in exactly one way: `merged_in` a round, or `set_aside` with a reason. Both are written
   once.
5. When the disk is full the transaction rolls back and `DiskFullError` is raised: the caller stops accepting
   and goes on later. Nothing that was accepted is touched. A disk that fails while it has room is another matter:
   `StorageError`, which waiting does not mend.
6. One process per journal: a lock on `journal.lock`, which the kernel lets go when its holder dies.
   `read_status` reads beside a running service and writes nothing.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import shutil
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aggregator.blobs import DiskFullError
from aggregator.intake import OpenUpload, Presence
from aggregator.rounds import OPEN
from edge_sdk.errors import EdgewiseError, StorageError

if TYPE_CHECKING:
    from aggregator.job import Job

log = logging.getLogger(__name__)

FILE = "journal.sqlite"
LOCK = "journal.lock"
SCHEMA = 1
REFUSALS_KEPT = 4096
REFUSALS_SHOWN = 32
SEQS_KEPT = 1024  # per (device, outbox_id); above the outbox cap of 256 entries (transport.md 6.2)


class JournalError(EdgewiseError):
    """The journal belongs to another job, is of another version, or is in use."""


class JournalBusyError(JournalError):
    """Another process runs this job."""

    exit_code = 4


@dataclass(frozen=True)
class Identity:
    """What a journal belongs to; a journal of another job, bundle or program is refused."""

    site: str
    job: str
    bundle: str  # digest
    program: str


@dataclass(frozen=True)
class LedgerRow:
    """An accepted update. `norm` is the Frobenius norm of its change, None for evidence."""

    device: str
    outbox_id: str
    seq: int
    upload: str
    task: str
    round: int
    phase: str
    start: str
    num_examples: int
    metrics: Mapping[str, float]
    norm: float | None


@dataclass(frozen=True)
class Alarm:
    """Something an operator should look at; counted, not repeated."""

    kind: str
    device: str
    detail: str
    count: int
    first: int  # gateway ms
    last: int


@dataclass(frozen=True)
class Refusal:
    """Why an update was refused; `detail` says what was found and what was expected."""

    at: int  # gateway ms
    device: str
    upload: str
    round: int
    reason: str
    detail: str


@dataclass(frozen=True)
class RoundRecord:
    """One round as the journal tells it. Scores are shares in [0, 1]; times gateway ms; `traffic` is bytes
    (up, down)."""

    round: int
    program: str
    opened: int
    start: str
    phase: str
    assigned: Sequence[str] = ()
    programs: Mapping[str, Sequence[Any]] = field(
        default_factory=dict
    )  # device -> (program that it trains, why, since ms)
    declined: Mapping[str, str] = field(default_factory=dict)
    closed: int | None = None
    outcome: str | None = None
    reason: str = ""
    candidate: str | None = None
    model: str | None = None
    score_before: float | None = None
    score_after: float | None = None
    evidence: Mapping[str, Sequence[float]] = field(default_factory=dict)  # device -> (sum, count) of the candidate
    validation_before: float | None = None
    validation_after: float | None = None
    merge: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)  # mean over updates, weighted by examples
    accepted: int = 0
    merged: int = 0
    set_aside: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, int] = field(default_factory=dict)
    traffic: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def seconds(self) -> float | None:
        """How long the round took, if it is over."""
        return None if self.closed is None else (self.closed - self.opened) / 1000

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, for `--json`."""
        return {**asdict(self), "seconds": self.seconds}


# What the journal derives from other tables when a record is read.
_DERIVED = ("accepted", "merged", "set_aside", "refused", "traffic")


@dataclass(frozen=True)
class DeviceStatus:
    """One device: presence, what became of its updates, bytes on the wire (payloads of messages)."""

    device: str
    online: bool
    outbox_id: str
    seen: int
    paused: str
    waiting: int
    accepted: int
    merged: int
    set_aside: int
    refused: int
    bytes_up: int
    bytes_down: int
    program: str = ""  # what it was told to train last
    reason: str = ""  # why, where the assigner has a reason


@dataclass(frozen=True)
class Status:
    """The job at a glance. `state`: `new` (never started), `running`, `stopped` (resumes when run again),
    `done`."""

    site: str
    job: str
    program: str
    state: str
    round: int
    rounds: int
    phase: str
    phase_deadline: int | None  # gateway ms
    broker: str  # where the service has its broker, "" before the first start
    assigned: int
    answered: int
    declined: int
    model: str | None
    devices: Sequence[DeviceStatus]
    alarms: Sequence[Alarm]
    accepted: int
    merged: int
    pending: int
    set_aside: Mapping[str, int]
    refused: Mapping[str, int]
    duplicated: int  # ledger rows merged more than once: 0 by construction, counted all the same
    history: Sequence[RoundRecord]
    refusals: Sequence[Refusal] = ()  # the newest, oldest first
    trained: int = 0  # of `merged`: updates that went into a candidate
    measured: int = 0  # of `merged`: reports on how good a model is
    uncounted: int = 0  # rounds that devices declined: `round` may be so much above `rounds`

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, for `--json`."""
        return {**asdict(self), "history": [record.to_json() for record in self.history]}


_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE ledger (
  device TEXT NOT NULL, outbox_id TEXT NOT NULL, seq INTEGER NOT NULL, upload TEXT NOT NULL, digest TEXT NOT
  NULL, size INTEGER NOT NULL, task TEXT NOT NULL, round INTEGER NOT NULL, phase TEXT NOT NULL, start TEXT
  NOT NULL, num_examples INTEGER NOT NULL, metrics TEXT NOT NULL, norm REAL, accepted_at INTEGER NOT NULL,
  merged_in INTEGER, set_aside TEXT,
  PRIMARY KEY (device, outbox_id, seq), UNIQUE (device, task),
  CHECK (merged_in IS NULL OR set_aside IS NULL)
);
CREATE INDEX ledger_round ON ledger (round, phase);
CREATE TABLE floor (
  device TEXT NOT NULL, outbox_id TEXT NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY (device, outbox_id)
) WITHOUT ROWID;
CREATE TABLE compacted (
  round INTEGER NOT NULL, device TEXT NOT NULL, fate TEXT NOT NULL, count INTEGER NOT NULL,
  PRIMARY KEY (round, device, fate)
) WITHOUT ROWID;
CREATE TABLE offer (
  device TEXT NOT NULL, upload TEXT NOT NULL, outbox_id TEXT NOT NULL, seq INTEGER NOT NULL,
  task TEXT NOT NULL, round INTEGER NOT NULL, phase TEXT NOT NULL, start TEXT NOT NULL, digest TEXT NOT NULL,
  size INTEGER NOT NULL, chunk INTEGER NOT NULL, chunks INTEGER NOT NULL,
  num_examples INTEGER NOT NULL, metrics TEXT NOT NULL, failures INTEGER NOT NULL,
  PRIMARY KEY (device, upload)
) WITHOUT ROWID;
CREATE TABLE part (
  device TEXT NOT NULL, upload TEXT NOT NULL, idx INTEGER NOT NULL, bytes BLOB NOT NULL,
  PRIMARY KEY (device, upload, idx)
);
CREATE TABLE round (round INTEGER PRIMARY KEY, record TEXT NOT NULL);
CREATE TABLE published (topic TEXT PRIMARY KEY, payload BLOB NOT NULL, expires INTEGER) WITHOUT ROWID;
CREATE TABLE evidence (
  model TEXT NOT NULL, device TEXT NOT NULL, task TEXT NOT NULL, sum REAL NOT NULL, count REAL NOT NULL,
  PRIMARY KEY (model, device)
) WITHOUT ROWID;
CREATE TABLE alarm (
  kind TEXT NOT NULL, device TEXT NOT NULL, detail TEXT NOT NULL, count INTEGER NOT NULL, first INTEGER NOT
  NULL, last INTEGER NOT NULL, PRIMARY KEY (kind, device)
) WITHOUT ROWID;
CREATE TABLE refusal (
  id INTEGER PRIMARY KEY, at INTEGER NOT NULL, device TEXT NOT NULL, upload TEXT NOT NULL, round INTEGER NOT
  NULL, reason TEXT NOT NULL, detail TEXT NOT NULL, UNIQUE (device, upload, reason)
);
CREATE TABLE refused (
  round INTEGER NOT NULL, device TEXT NOT NULL, reason TEXT NOT NULL, count INTEGER NOT NULL,
  PRIMARY KEY (round, device, reason)
) WITHOUT ROWID;
CREATE TABLE device (
  device TEXT PRIMARY KEY, outbox_id TEXT NOT NULL, boot TEXT NOT NULL, connection INTEGER NOT NULL,
  online INTEGER NOT NULL, seen INTEGER NOT NULL, paused TEXT NOT NULL, entries INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE counter (device TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE traffic (
  round INTEGER NOT NULL, device TEXT NOT NULL, up INTEGER NOT NULL, down INTEGER NOT NULL,
  PRIMARY KEY (round, device)
) WITHOUT ROWID;
"""

MEASURED = "measured"  # fate of a compacted row: a report on a model, merged like a training update (fate "")
_MERGED = ("", MEASURED)
_NO_ROOM = 1 << 20  # bytes free, below which an input/output error of SQLite means a full disk


class Journal:
    """The journal of one job, open for writing. Not thread-safe: one thread owns it."""

    def __init__(self, folder: Path, identity: Identity) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        self._lock = _lock(folder / LOCK)
        try:
            self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            self._prepare(identity)
        except BaseException as error:
            os.close(self._lock)
            if isinstance(error, sqlite3.Error):
                raise JournalError(f"{self.path}: cannot open the journal: {error}") from error
            raise
        self.nonce = self.meta("nonce") or ""

    def _prepare(self, identity: Identity) -> None:
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA busy_timeout=10000")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, SCHEMA):
            raise JournalError(
                f"{self.path}: schema version {version}, this program writes {SCHEMA}; use the matching version"
            )
        if version == 0:
            fields = {**asdict(identity), "nonce": secrets.token_hex(8)}
            with self.transaction():
                for statement in _SCHEMA.split(";\n"):
                    if statement.strip():
                        self._db.execute(statement)
                self._db.executemany("INSERT INTO meta VALUES (?, ?)", list(fields.items()))
                self._db.execute(f"PRAGMA user_version={SCHEMA}")
        for name, wanted in asdict(identity).items():
            found = self.meta(name)
            if found != wanted:
                raise JournalError(
                    f"{self.path}: belongs to {name} {found!r}, the job file says {wanted!r}; "
                    "give the job another `state` folder"
                )

    def close(self) -> None:
        """Close the file and let go of the lock."""
        self._db.close()
        os.close(self._lock)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing. Raises `DiskFullError` (rolled back) when the disk is full."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            self._rollback()
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            # A shared-memory file that cannot grow is reported as an input/output error, not as a full disk.
            if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and self._is_full()):
                raise DiskFullError(f"{self.path}: {error}; free some disk space") from error
            if code == sqlite3.SQLITE_IOERR:
                raise StorageError(f"{self.path}: {error}; check the disk and the rights of the folder") from error
            raise
        except BaseException:
            self._rollback()
            raise

    def _is_full(self) -> bool:
        try:
            return shutil.disk_usage(self.path.parent).free < _NO_ROOM
        except OSError:
            return False

    def _rollback(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def limit_pages(self, pages: int | None) -> None:
        """Let SQLite refuse to grow beyond so many pages (None: no limit), as a full disk would."""
        self._db.execute(f"PRAGMA max_page_count={pages or 1_073_741_823:d}")

    def pages(self) -> int:
        """The size of the file in pages."""
        return int(self._db.execute("PRAGMA page_count").fetchone()[0])

    def meta(self, key: str) -> str | None:
        """A named value."""
        row = self._db.execute("SELECT value FROM meta WHERE key=?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def set_meta(self, key: str, value: str) -> None:
        """Write a named value."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    # Uploads that are under way.

    def store_offer(self, upload: OpenUpload) -> None:
        """Remember an offer; a repeated one changes nothing but the count of failures."""
        self._db.execute(
            "INSERT INTO offer VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?) "
            "ON CONFLICT (device, upload) DO UPDATE SET failures=excluded.failures",
            (
                *(upload.device, upload.upload, upload.outbox_id, upload.seq, upload.task, upload.round),
                *(upload.phase, upload.start, upload.digest, upload.size, upload.chunk, upload.chunks),
                upload.num_examples,
                *(json.dumps(dict(upload.metrics), sort_keys=True), upload.failures),
            ),
        )

    def offers(self) -> list[tuple[OpenUpload, frozenset[int]]]:
        """Every open upload with the chunk indexes that are stored."""
        rows = self._db.execute(
            "SELECT device, upload, outbox_id, seq, task, round, phase, start, digest, size, chunk, chunks, "
            "num_examples, metrics, failures FROM offer ORDER BY device, upload"
        )
        uploads = [OpenUpload(*(*row[:13], json.loads(row[13]), row[14])) for row in rows]
        return [(upload, self.stored(upload.device, upload.upload)) for upload in uploads]

    def stored(self, device: str, upload: str) -> frozenset[int]:
        """The chunk indexes of an upload that are stored."""
        rows = self._db.execute("SELECT idx FROM part WHERE device=? AND upload=?", (device, upload))
        return frozenset(int(row[0]) for row in rows)

    def store_chunk(self, device: str, upload: str, index: int, data: bytes) -> None:
        """Store one chunk; a duplicate changes nothing."""
        self._db.execute("INSERT OR IGNORE INTO part VALUES (?, ?, ?, ?)", (device, upload, index, data))

    def chunks(self, device: str, upload: str) -> Iterator[bytes]:
        """The body of an upload, row by row."""
        rows = self._db.execute("SELECT bytes FROM part WHERE device=? AND upload=? ORDER BY idx", (device, upload))
        for row in rows:
            yield bytes(row[0])

    def body(self, device: str, upload: str) -> bytes:
        """The whole body of an upload."""
        return b"".join(self.chunks(device, upload))

    def drop_parts(self, device: str, upload: str) -> None:
        """Forget the bytes of an upload."""
        self._db.execute("DELETE FROM part WHERE device=? AND upload=?", (device, upload))

    def drop_offer(self, device: str, upload: str) -> None:
        """Forget an open upload and its bytes."""
        self._db.execute("DELETE FROM offer WHERE device=? AND upload=?", (device, upload))
        self.drop_parts(device, upload)

    # The ledger.

    def recorded(self, device: str, outbox_id: str, seq: int) -> str | None:
        """The digest accepted under this number, or None."""
        row = self._db.execute(
            "SELECT digest FROM ledger WHERE device=? AND outbox_id=? AND seq=?", (device, outbox_id, seq)
        ).fetchone()
        return None if row is None else str(row[0])

    def floor(self, device: str, outbox_id: str) -> int:
        """Numbers up to this one are closed for good: their rows were compacted (0: none)."""
        row = self._db.execute("SELECT seq FROM floor WHERE device=? AND outbox_id=?", (device, outbox_id)).fetchone()
        return 0 if row is None else int(row[0])

    def answered(self, device: str, task: str) -> bool:
        """Whether the ledger holds an update of this device for this task."""
        found = self._db.execute("SELECT 1 FROM ledger WHERE device=? AND task=?", (device, task))
        return found.fetchone() is not None

    def accept(self, upload: OpenUpload, *, norm: float | None, now: int) -> None:
        """Insert the ledger row and delete the offer; the parts stay as the body. Raises on a second
        acceptance."""
        self._db.execute(
            "INSERT INTO ledger (device, outbox_id, seq, upload, digest, size, task, round, phase, start, "
            "num_examples, metrics, norm, accepted_at) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            (
                *(upload.device, upload.outbox_id, upload.seq, upload.upload, upload.digest, upload.size),
                *(upload.task, upload.round, upload.phase, upload.start, upload.num_examples),
                *(json.dumps(dict(upload.metrics), sort_keys=True), norm, now),
            ),
        )
        self._db.execute("DELETE FROM offer WHERE device=? AND upload=?", (upload.device, upload.upload))
        if upload.seq > SEQS_KEPT and upload.seq % 64 == 0:
            self._compact(upload.device, upload.outbox_id, upload.seq - SEQS_KEPT)

    def _compact(self, device: str, outbox_id: str, floor: int) -> None:
        where = "device=? AND outbox_id=? AND seq<=? AND (merged_in IS NOT NULL OR set_aside IS NOT NULL)"
        key = (device, outbox_id, floor)
        self._db.execute(
            "INSERT INTO compacted SELECT round, device, "  # noqa: S608
            f"CASE WHEN merged_in IS NULL THEN set_aside WHEN phase='train' THEN '' ELSE '{MEASURED}' END, "
            f"count(*) FROM ledger WHERE {where} "
            "GROUP BY 1, 2, 3 ON CONFLICT (round, device, fate) DO UPDATE SET count=count+excluded.count",
            key,
        )
        self._db.execute(f"DELETE FROM ledger WHERE {where}", key)  # noqa: S608
        self._db.execute("INSERT OR REPLACE INTO floor VALUES (?, ?, ?)", key)

    def updates(self, number: int, phase: str) -> list[LedgerRow]:
        """The accepted updates of a phase that are neither merged nor set aside, sorted by (device, outbox,
        seq)."""
        rows = self._db.execute(
            "SELECT device, outbox_id, seq, upload, task, round, phase, start, num_examples, metrics, norm "
            "FROM ledger WHERE round=? AND phase=? AND merged_in IS NULL AND set_aside IS NULL "
            "ORDER BY device, seq, outbox_id",
            (number, phase),
        )
        return [LedgerRow(*(*row[:9], json.loads(row[9]), row[10])) for row in rows]

    def unmerged(self, number: int) -> list[LedgerRow]:
        """The accepted training updates up to round `number` that are neither merged nor set aside, sorted likewise."""
        rows = self._db.execute(
            "SELECT device, outbox_id, seq, upload, task, round, phase, start, num_examples, metrics, norm "
            "FROM ledger WHERE round<=? AND phase='train' AND merged_in IS NULL AND set_aside IS NULL "
            "ORDER BY device, seq, outbox_id",
            (number,),
        )
        return [LedgerRow(*(*row[:9], json.loads(row[9]), row[10])) for row in rows]

    def mark_merged(self, rows: Sequence[LedgerRow], number: int, *, keep_bodies: bool) -> None:
        """Mark these rows as merged in a round, each exactly once, and delete their bodies."""
        for row in rows:
            done = self._db.execute(
                "UPDATE ledger SET merged_in=? WHERE device=? AND outbox_id=? AND seq=? "
                "AND merged_in IS NULL AND set_aside IS NULL",
                (number, row.device, row.outbox_id, row.seq),
            )
            if done.rowcount != 1:
                raise JournalError(f"{self.path}: {row.upload} of {row.device} was merged or set aside before")
            if not keep_bodies:
                self.drop_parts(row.device, row.upload)

    def set_aside(self, rows: Sequence[LedgerRow], reason: str, *, keep_bodies: bool) -> None:
        """Mark these rows as left out for a reason, and delete their bodies."""
        for row in rows:
            self._db.execute(
                "UPDATE ledger SET set_aside=? WHERE device=? AND outbox_id=? AND seq=? AND merged_in IS NULL",
                (reason, row.device, row.outbox_id, row.seq),
            )
            self._db.execute("DELETE FROM evidence WHERE device=? AND task=?", (row.device, row.task))
            if not keep_bodies:
                self.drop_parts(row.device, row.upload)

    def unmerged_of(self, device: str) -> list[LedgerRow]:
        """Everything accepted of a device, of any phase, that is neither merged nor set aside."""
        rows = self._db.execute(
            "SELECT device, outbox_id, seq, upload, task, round, phase, start, num_examples, metrics, norm "
            "FROM ledger WHERE device=? AND merged_in IS NULL AND set_aside IS NULL ORDER BY seq, outbox_id",
            (device,),
        )
        return [LedgerRow(*(*row[:9], json.loads(row[9]), row[10])) for row in rows]

    def has_merged(self, device: str, number: int) -> bool:
        """Whether a training update of a device was merged in a round."""
        found = self._db.execute(
            "SELECT 1 FROM ledger WHERE device=? AND merged_in=? AND phase='train'", (device, number)
        )
        return found.fetchone() is not None

    def row_of_task(self, device: str, task: str) -> LedgerRow | None:
        """The accepted update of a device for a task."""
        row = self._db.execute(
            "SELECT device, outbox_id, seq, upload, task, round, phase, start, num_examples, metrics, norm "
            "FROM ledger WHERE device=? AND task=?",
            (device, task),
        ).fetchone()
        return None if row is None else LedgerRow(*(*row[:9], json.loads(row[9]), row[10]))

    def last_norms(self, before: int) -> list[float]:
        """The norms of the merged updates of the last round before `before` that merged any."""
        rows = self._db.execute(
            "SELECT norm FROM ledger WHERE norm IS NOT NULL AND merged_in=(SELECT max(merged_in) FROM ledger "
            "WHERE norm IS NOT NULL AND merged_in<?) ORDER BY device, seq",
            (before,),
        )
        return [float(row[0]) for row in rows]

    # Evidence: what devices counted with a model.

    def add_evidence(self, model: str, device: str, task: str, total: float, count: float) -> None:
        """Store a device's counts for a model; newer ones replace older ones."""
        self._db.execute("INSERT OR REPLACE INTO evidence VALUES (?, ?, ?, ?, ?)", (model, device, task, total, count))

    def evidence(self, model: str) -> dict[str, tuple[float, float]]:
        """device -> (sum, count) for a model."""
        rows = self._db.execute("SELECT device, sum, count FROM evidence WHERE model=? ORDER BY device", (model,))
        return {row[0]: (float(row[1]), float(row[2])) for row in rows}

    def prune_evidence(self, keep: Sequence[str]) -> None:
        """Forget the evidence on all models but these."""
        marks = ",".join("?" * len(keep))
        self._db.execute(f"DELETE FROM evidence WHERE model NOT IN ({marks})", tuple(keep))  # noqa: S608

    # Rounds and what was published.

    def rounds_state(self) -> dict[str, Any] | None:
        """What `save_rounds_state` stored last."""
        saved = self.meta("rounds")
        return None if saved is None else json.loads(saved)

    def save_rounds_state(self, state: Mapping[str, Any]) -> None:
        """Store the state of `aggregator.rounds`."""
        self.set_meta("rounds", json.dumps(state, sort_keys=True))

    def save_round(self, record: RoundRecord) -> None:
        """Store the record of a round, without the parts that other tables hold."""
        fields = {name: value for name, value in asdict(record).items() if name not in _DERIVED}
        self._db.execute(
            "INSERT OR REPLACE INTO round VALUES (?, ?)", (record.round, json.dumps(fields, sort_keys=True))
        )

    def round(self, number: int) -> RoundRecord | None:
        """The record of one round."""
        row = self._db.execute("SELECT record FROM round WHERE round=?", (number,)).fetchone()
        return None if row is None else _record(self._db, json.loads(row[0]))

    def assigned(self, number: int, device: str) -> str | None:
        """The id of the program that a device was told to train in a round."""
        row = self._db.execute(
            "SELECT json_extract(record, '$.programs.' || json_quote(?2) || '[0]') FROM round WHERE round=?1",
            (number, device),
        ).fetchone()
        return None if row is None else row[0]

    def accepted_since(self, row: int) -> tuple[int, list[tuple[LedgerRow, int]]]:
        """Updates of training phases accepted after ledger row `row`, with gateway ms, and the number of the last row."""
        rows = self._db.execute(
            "SELECT device, outbox_id, seq, upload, task, round, phase, start, num_examples, metrics, norm, accepted_at, "
            "rowid FROM ledger WHERE rowid>? AND phase='train' ORDER BY rowid",
            (row,),
        ).fetchall()
        found = [(LedgerRow(*(*held[:9], json.loads(held[9]), held[10])), int(held[11])) for held in rows]
        return (int(rows[-1][12]) if rows else row), found

    def publish(self, topic: str, payload: bytes, expires: int | None) -> None:
        """Remember a retained message (empty: cleared); `expires` is gateway ms."""
        self._db.execute("INSERT OR REPLACE INTO published VALUES (?, ?, ?)", (topic, payload, expires))

    def published(self) -> list[tuple[str, bytes, int | None]]:
        """Every retained message as it should stand at the broker."""
        return list(self._db.execute("SELECT topic, payload, expires FROM published ORDER BY topic"))

    # Devices.

    def save_presence(self, presence: Presence) -> None:
        """Store what a device said about itself."""
        values = asdict(replace(presence, former={}))
        self._db.execute(
            "INSERT OR REPLACE INTO device (device, outbox_id, boot, connection, online, seen, paused, "
            "entries) "
            "VALUES (:device, :outbox_id, :boot, :connection, :online, :seen, :paused, :entries)",
            values,
        )

    def presences(self) -> list[Presence]:
        """Every device that ever spoke."""
        rows = self._db.execute(
            "SELECT device, outbox_id, boot, connection, online, seen, paused, entries FROM device ORDER BY device"
        )
        return [Presence(*(*row[:4], bool(row[4]), *row[5:])) for row in rows]

    def next_counter(self, device: str, now: int) -> int:
        """The next number of a command to a device. It rises for ever, also above those of a journal before this one."""
        row = self._db.execute(
            "INSERT INTO counter VALUES (?1, ?2) "
            "ON CONFLICT (device) DO UPDATE SET value=max(value+1, ?2) RETURNING value",
            (device, now),
        ).fetchone()
        return int(row[0])

    def add_traffic(self, number: int, device: str, up: int, down: int) -> None:
        """Count bytes from and to a device in a round."""
        self._db.execute(
            "INSERT INTO traffic VALUES (?, ?, ?, ?) "
            "ON CONFLICT (round, device) DO UPDATE SET up=up+excluded.up, down=down+excluded.down",
            (number, device, up, down),
        )

    def raise_alarm(self, kind: str, device: str, detail: str, now: int) -> None:
        """Record an alarm; a repeated one is counted."""
        self._db.execute(
            "INSERT INTO alarm VALUES (?, ?, ?, 1, ?, ?) ON CONFLICT (kind, device) "
            "DO UPDATE SET count=count+1, detail=excluded.detail, last=excluded.last",
            (kind, device, detail, now, now),
        )

    def refuse(self, device: str, upload: str, number: int, reason: str, detail: str, now: int) -> None:
        """Record why an upload was refused; a repeated refusal of one upload is not counted again."""
        new = self._db.execute(
            "INSERT OR IGNORE INTO refusal (at, device, upload, round, reason, detail) VALUES (?, ?, ?, ?, ?, ?)",
            (now, device, upload, number, reason, detail[:500]),
        )
        if new.rowcount != 1:
            return
        self._db.execute(
            "INSERT INTO refused VALUES (?, ?, ?, 1) ON CONFLICT (round, device, reason) DO UPDATE SET count=count+1",
            (number, device, reason),
        )
        self._db.execute("DELETE FROM refusal WHERE id<=?", (new.lastrowid - REFUSALS_KEPT if new.lastrowid else 0,))

    def refusals(self) -> list[Refusal]:
        """The newest refusals, oldest first."""
        return _refusals(self._db, REFUSALS_KEPT)

    def status(self, rounds: int) -> Status:
        """The job at a glance, from this open journal."""
        return _status(self._db, rounds, running=True)


def _lock(path: Path) -> int:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(handle, 32).decode("ascii", "replace").strip()
        os.close(handle)
        raise JournalBusyError(
            f"{path}: another process{f' (pid {holder})' if holder else ''} runs this job; "
            "stop it first, or give the job another `state` folder"
        ) from error
    os.ftruncate(handle, 0)
    os.write(handle, f"{os.getpid()}\n".encode())
    return handle


def is_running(folder: Path) -> bool:
    """Whether a process holds the journal in this state folder."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        # A shared lock: two readers never take each other for the service.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def read_journal(folder: Path, rounds: int) -> Status | None:
    """The status of the job whose state is in `folder`, read-only; None if it never ran."""
    path = folder / FILE
    if not path.exists():
        return None
    running = is_running(folder)
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)) as db:
            db.execute("PRAGMA busy_timeout=10000")
            if db.execute("PRAGMA user_version").fetchone()[0] == 0:
                return None  # the service is just making it
            db.execute("BEGIN")  # one consistent picture
            return _status(db, rounds, running=running)
    except sqlite3.Error as error:
        raise JournalError(f"{path}: cannot read the journal: {error}") from error


def read_status(job: Job) -> Status:
    """The status of a job, read from its journal without disturbing a running service."""
    status = read_journal(job.state, job.rounds)
    if status is not None:
        return status
    return Status(
        site=job.site,
        job=job.job,
        program=job.program,
        state="new",
        round=0,
        rounds=job.rounds,
        phase="wait",
        phase_deadline=None,
        broker="",
        assigned=0,
        answered=0,
        declined=0,
        model=None,
        devices=(),
        alarms=(),
        accepted=0,
        merged=0,
        pending=0,
        set_aside={},
        refused={},
        duplicated=0,
        history=(),
    )


def _status(db: sqlite3.Connection, rounds: int, *, running: bool) -> Status:
    meta = dict(db.execute("SELECT key, value FROM meta"))
    state = json.loads(meta["rounds"]) if "rounds" in meta else None
    fates = list(
        db.execute(
            "SELECT device, CASE WHEN merged_in IS NOT NULL THEN '' ELSE set_aside END, count(*) FROM ledger "
            "GROUP BY 1, 2 UNION ALL SELECT device, fate, count FROM compacted"
        )
    )
    refused = list(db.execute("SELECT device, reason, count FROM refused"))
    traffic = {row[0]: row[1:] for row in db.execute("SELECT device, sum(up), sum(down) FROM traffic GROUP BY 1")}
    history = [_record(db, json.loads(row[0])) for row in db.execute("SELECT record FROM round ORDER BY round")]
    told = {device: entry for record in history for device, entry in record.programs.items()}
    devices = []
    for row in db.execute("SELECT device, outbox_id, online, seen, paused, entries FROM device ORDER BY device"):
        mine = [(fate, count) for device, fate, count in fates if device == row[0]]
        up, down = traffic.get(row[0], (0, 0))
        devices.append(
            DeviceStatus(
                device=row[0],
                outbox_id=row[1],
                online=bool(row[2]),
                seen=row[3],
                paused=row[4],
                waiting=row[5],
                accepted=sum(count for _, count in mine),
                merged=sum(count for fate, count in mine if fate in _MERGED),
                set_aside=sum(count for fate, count in mine if fate and fate not in _MERGED),
                refused=sum(count for device, _, count in refused if device == row[0]),
                bytes_up=up,
                bytes_down=down,
                program=told.get(row[0], ("", ""))[0],
                reason=told.get(row[0], ("", ""))[1],
            )
        )
    aside = _sum_by([(fate, count) for _, fate, count in fates if fate and fate not in _MERGED])
    merged = sum(count for _, fate, count in fates if fate in _MERGED)
    pending = sum(count for _, fate, count in fates if fate is None)
    answers = [answer for _, answer, *_ in state["tasks"].values()] if state else []
    uncounted = state.get("uncounted", 0) if state else 0
    done = state is not None and state["phase"] == "done" and state["round"] - uncounted >= rounds
    folded = db.execute("SELECT coalesce(sum(json_extract(record, '$.merge.updates')), 0) FROM round").fetchone()[0]
    marked = db.execute(
        "SELECT (SELECT count(*) FROM ledger WHERE merged_in IS NOT NULL AND phase='train') + "
        "(SELECT coalesce(sum(count), 0) FROM compacted WHERE fate='')"
    ).fetchone()[0]
    return Status(
        site=meta["site"],
        job=meta["job"],
        program=meta["program"],
        state="done" if done else "running" if running else "stopped",
        round=state["round"] if state else 0,
        rounds=rounds,
        uncounted=uncounted,
        phase=state["phase"] if state else "wait",
        phase_deadline=state["phase_deadline"] if state and state["phase"] in OPEN else None,
        broker=meta.get("broker", ""),
        assigned=len(answers),
        answered=answers.count("answered"),
        declined=answers.count("declined"),
        model=state["model"] if state else None,
        devices=devices,
        alarms=[Alarm(*row) for row in db.execute("SELECT kind, device, detail, count, first, last FROM alarm")],
        accepted=merged + pending + sum(aside.values()),
        merged=merged,
        pending=pending,
        set_aside=aside,
        refused=_sum_by([(reason, count) for _, reason, count in refused]),
        # Every merge report says how many updates it folded; more of them than marked rows would mean a
        # second merge.
        trained=folded,
        measured=merged - folded,
        duplicated=max(0, folded - marked),
        history=history,
        refusals=_refusals(db, REFUSALS_SHOWN),
    )


def _refusals(db: sqlite3.Connection, most: int) -> list[Refusal]:
    rows = db.execute("SELECT at, device, upload, round, reason, detail FROM refusal ORDER BY id DESC LIMIT ?", (most,))
    return [Refusal(*row) for row in rows][::-1]


def _record(db: sqlite3.Connection, fields: dict[str, Any]) -> RoundRecord:
    number = (fields["round"],)
    fates = list(
        db.execute(
            "SELECT CASE WHEN merged_in IS NOT NULL THEN '' ELSE set_aside END, count(*) FROM ledger "
            "WHERE round=?1 AND phase='train' GROUP BY 1",
            number,
        )
    )
    refused = db.execute("SELECT reason, count FROM refused WHERE round=?", number)
    traffic = db.execute("SELECT device, up, down FROM traffic WHERE round=? ORDER BY device", number)
    return RoundRecord(
        **fields,
        accepted=sum(count for _, count in fates),
        merged=sum(count for fate, count in fates if fate == ""),
        set_aside=_sum_by([(fate, count) for fate, count in fates if fate]),
        refused=_sum_by(list(refused)),
        traffic={device: (up, down) for device, up, down in traffic},
    )


def _sum_by(pairs: Sequence[tuple[str, int]]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for key, count in pairs:
        totals[key] = totals.get(key, 0) + count
    return dict(sorted(totals.items()))
