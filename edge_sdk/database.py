"""What the outbox and the sample store share: transactions, and SQLite's errors as ones that say what to do about them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_sdk.errors import StorageError


@contextmanager
def storage_errors(path: Path, what: str) -> Iterator[None]:
    """Around statements on the database `path`: `what` failed, in words ("samples cannot be read")."""
    try:
        yield
    except sqlite3.IntegrityError as error:  # nothing that room on the disk could mend
        raise StorageError(f"{path}: {what}: it contradicts what is stored ({error})") from error
    except sqlite3.ProgrammingError as error:
        raise StorageError(f"{path}: {what} ({error}): open it again if it was closed") from error
    except sqlite3.Error as error:
        raise StorageError(f"{path}: {what} ({error}); free some disk space, or mend the disk") from error


@contextmanager
def transaction(db: sqlite3.Connection, path: Path, what: str) -> Iterator[None]:
    """All statements inside, or none of them. Raises `StorageError`: `what` failed, as in `storage_errors`."""
    with storage_errors(path, what):
        try:
            db.execute("BEGIN IMMEDIATE")
            yield
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
