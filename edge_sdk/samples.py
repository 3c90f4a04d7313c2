"""The device's own examples: an SQLite file, bounded in bytes, that survives a power cut.

Rules: a sample is checked before it is written (shape, dtype, finite, label); `add_many` is one transaction, so all of its
samples are stored or none; when the store is full the oldest samples go; nothing here ever leaves the device.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.bundle import HeldOut
from edge_sdk.database import storage_errors, transaction
from edge_sdk.errors import SampleError, StorageError
from edge_sdk.fields import INPUT, TARGET, FieldSpec, check_batch
from edge_sdk.tensors import Array

Ids = npt.NDArray[np.int64]

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE sample (id INTEGER PRIMARY KEY AUTOINCREMENT, recording TEXT NOT NULL, data BLOB NOT NULL);
CREATE INDEX sample_recording ON sample (recording, id);
"""
_VERSION = 1
_READ_AT_ONCE = 500  # SQLite's oldest limit on parameters of one statement is 999


class SampleStore:
    """A bounded store of samples with the fields of a bundle. Safe to use from several threads.

    `max_bytes` bounds the samples' own bytes (the file has a few percent more). Raises `SampleError` if the file holds
    samples of other fields, `StorageError` if it cannot be used.
    """

    def __init__(self, path: Path, fields: Sequence[FieldSpec], *, max_bytes: int) -> None:
        self._path = path
        self._fields = {field.name: field for field in fields}
        self._sample_bytes = sum(field.nbytes for field in fields)
        self._capacity = max_bytes // self._sample_bytes
        if self._capacity < 1:
            raise SampleError(
                f"one sample takes {self._sample_bytes} bytes and the store may hold {max_bytes}: raise limits.sample_bytes"
            )
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA cache_size=-256")  # KiB; rows are read once, the system caches the file
            self._prepare()
        except (sqlite3.Error, OSError) as error:
            raise StorageError(f"{path}: the sample store cannot be opened ({error})") from error

    def _prepare(self) -> None:
        layout = json.dumps([[field.name, field.dtype, list(field.shape)] for field in self._fields.values()])
        if self._db.execute("PRAGMA user_version").fetchone()[0] == 0:
            with self._transaction():
                for statement in _SCHEMA.split(";\n"):
                    if statement.strip():
                        self._db.execute(statement)
                self._db.execute("INSERT INTO meta VALUES ('fields', ?)", (layout,))
                self._db.execute(f"PRAGMA user_version={_VERSION}")
        stored = self._db.execute("SELECT value FROM meta WHERE key='fields'").fetchone()
        if stored is None or stored[0] != layout:
            raise SampleError(
                f"{self._path}: holds samples of the fields {stored and stored[0]}, the bundle has {layout}: "
                "give this bundle another store folder"
            )

    def add(self, x: Array | Mapping[str, Array], y: Any, *, recording: str = "") -> int:
        """Store one sample: `x` of shape `[*shape]` (a map of fields where there are several inputs), its label or target `y`.

        `recording` groups samples that follow each other in time; the last part of each group is kept out of training.
        Returns the sample's id. Raises `SampleError` and `StorageError`; nothing is stored then.
        """
        values = dict(x) if isinstance(x, Mapping) else {INPUT: x}
        batch = {name: self._fields[name].batch_of_one(v) for name, v in values.items() if name in self._fields}
        target = {TARGET: self._fields[TARGET].batch_of_one(y)} if TARGET in self._fields else {}
        return int(self._store({**values, **batch, **target}, recording)[-1])

    def add_many(self, x: Array | Mapping[str, Array], y: Array, *, recording: str = "") -> Ids:
        """Store a batch `[n, *shape]` in one transaction; otherwise as `add`. Returns the ids."""
        values = {name: np.asarray(v) for name, v in (x.items() if isinstance(x, Mapping) else [(INPUT, x)])}
        return self._store({**values, TARGET: np.asarray(y)}, recording)

    def _store(self, batch: Mapping[str, Array], recording: str) -> Ids:
        if set(batch) != set(self._fields):
            raise SampleError(f"a sample has the fields {', '.join(self._fields)}; found {', '.join(batch)}")
        count = check_batch(self._fields, batch)
        if count > self._capacity:
            raise SampleError(
                f"{count} samples at once, and the store holds {self._capacity}: add fewer, or raise its limit"
            )
        flat = [np.ascontiguousarray(batch[name]).reshape(count, -1).view(np.uint8) for name in self._fields]
        rows = np.concatenate(flat, axis=1)
        ids = np.empty(count, np.int64)
        with self._lock, self._transaction():
            for index, row in enumerate(rows):
                added = self._db.execute(
                    "INSERT INTO sample (recording, data) VALUES (?, ?)", (recording, row.tobytes())
                )
                ids[index] = int(added.lastrowid or 0)
            surplus = self._count() - self._capacity
            if surplus > 0:
                self._db.execute(
                    "DELETE FROM sample WHERE id IN (SELECT id FROM sample ORDER BY id LIMIT ?)", (surplus,)
                )
        return ids

    def train_ids(self, held_out: HeldOut) -> Ids:
        """The samples that may train: of each recording all but the held-out end and the `gap` samples before it."""
        return self._split(held_out)[0]

    def held_out_ids(self, held_out: HeldOut) -> Ids:
        """The last `share` of each recording, in the order of time; at least one sample of a recording with five or more."""
        return self._split(held_out)[1]

    def _split(self, held_out: HeldOut) -> tuple[Ids, Ids]:
        with self._reading():
            rows = self._db.execute("SELECT recording, id FROM sample ORDER BY recording, id").fetchall()
        recordings: dict[str, list[int]] = {}
        for recording, sample_id in rows:
            recordings.setdefault(recording, []).append(sample_id)
        train: list[int] = []
        kept: list[int] = []
        for ids in recordings.values():
            last = int(held_out.share * len(ids))
            if last == 0 and held_out.share > 0 and len(ids) >= 5:
                last = 1
            train += ids[: max(0, len(ids) - last - held_out.gap)] if last else ids
            kept += ids[len(ids) - last :]
        return np.array(train, np.int64), np.array(kept, np.int64)

    def read(self, ids: Ids) -> dict[str, Array]:
        """The samples of these ids, in this order, as a batch by field name. Raises `SampleError` for an id that is gone."""
        stored, batch = self.read_stored(ids)
        if len(stored) < len(ids):
            absent = np.setdiff1d(ids, stored)
            raise SampleError(f"{self._path}: sample {absent[0]} is no longer stored")
        return batch

    def read_stored(self, ids: Ids) -> tuple[Ids, dict[str, Array]]:
        """Those of these ids that are still stored, in this order, and their samples as `read` gives them."""
        found: dict[int, bytes] = {}
        wanted = [int(sample_id) for sample_id in ids]
        with self._reading():
            for first in range(0, len(wanted), _READ_AT_ONCE):
                part = wanted[first : first + _READ_AT_ONCE]
                marks = ",".join("?" * len(part))
                found.update(self._db.execute(f"SELECT id, data FROM sample WHERE id IN ({marks})", part))  # noqa: S608
        stored = [sample_id for sample_id in wanted if sample_id in found]
        joined = np.frombuffer(b"".join(found[i] for i in stored), np.uint8).reshape(len(stored), self._sample_bytes)
        batch: dict[str, Array] = {}
        begin = 0
        for name, field in self._fields.items():
            column = np.ascontiguousarray(joined[:, begin : begin + field.nbytes])
            batch[name] = column.view(field.dtype).reshape(len(stored), *field.shape)
            begin += field.nbytes
        return np.array(stored, np.int64), batch

    def has(self, recording: str) -> bool:
        """Whether a sample of this recording is stored."""
        with self._reading():
            row = self._db.execute("SELECT 1 FROM sample WHERE recording=? LIMIT 1", (recording,)).fetchone()
        return row is not None

    def oldest(self) -> int:
        """The smallest id stored, 0 if there is none: of the ids ever given, those below are gone, the others stored."""
        with self._reading():
            row = self._db.execute("SELECT min(id) FROM sample").fetchone()
        return int(row[0] or 0)

    @property
    def bytes(self) -> int:
        """Bytes of the stored samples."""
        return len(self) * self._sample_bytes

    def __len__(self) -> int:
        with self._reading():
            return self._count()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def _count(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM sample").fetchone()[0])

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._lock, storage_errors(self._path, "samples cannot be read"):
            yield

    def _transaction(self) -> AbstractContextManager[None]:
        return transaction(self._db, self._path, "samples cannot be stored")
