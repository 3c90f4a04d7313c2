"""The journal, with real files and real processes that die."""

from __future__ import annotations

import resource
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from aggregator.blobs import DiskFullError
from aggregator.intake import OpenUpload, Presence
from aggregator.journal import (
    Identity,
    Journal,
    JournalBusyError,
    JournalError,
    RoundRecord,
    is_running,
    read_journal,
)
from edge_sdk.errors import StorageError

IDENTITY = Identity(site="bremen", job="watch", bundle="b" * 64, program="tiny/head/float")


def upload(seq: int = 1, device: str = "dev-1", **changes: object) -> OpenUpload:
    fields = {
        "device": device,
        "upload": f"0badcafe-{seq:08d}-{'d' * 12}",
        "outbox_id": "0badcafe00000000",
        "seq": seq,
        "task": f"{seq:016x}",
        "round": 1,
        "phase": "train",
        "start": "s" * 64,
        "digest": "d" * 64,
        "size": 10,
        "chunk": 4,
        "chunks": 3,
        "num_examples": 7,
        "metrics": {"loss": 0.5},
    }
    return OpenUpload(**{**fields, **changes})  # type: ignore[arg-type]


def accept(journal: Journal, item: OpenUpload, norm: float | None = 1.0) -> None:
    journal.store_offer(item)
    for index, part in enumerate((b"abcd", b"efgh", b"ij")):
        journal.store_chunk(item.device, item.upload, index, part)
    journal.accept(item, norm=norm, now=5)


def store_large(journal: Journal) -> None:
    with journal.transaction():
        journal.store_offer(upload(2))
        journal.store_chunk("dev-1", upload(2).upload, 0, b"x" * 65536)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path, IDENTITY)


def test_parts_come_back_in_order_whatever_order_they_came_in(journal: Journal) -> None:
    item = upload()
    with journal.transaction():
        journal.store_offer(item)
        for index in (2, 0, 1):
            journal.store_chunk(item.device, item.upload, index, b"abcdefghij"[4 * index : 4 * index + 4])
        journal.store_chunk(item.device, item.upload, 0, b"XXXX")
    assert journal.body(item.device, item.upload) == b"abcdefghij"
    assert journal.offers() == [(item, frozenset({0, 1, 2}))]


def test_acceptance_moves_the_offer_to_the_ledger_and_keeps_the_body(journal: Journal) -> None:
    with journal.transaction():
        accept(journal, upload())
    assert journal.offers() == []
    assert journal.recorded("dev-1", "0badcafe00000000", 1) == "d" * 64
    assert journal.answered("dev-1", f"{1:016x}")
    assert journal.body("dev-1", upload().upload) == b"abcdefghij"


def test_the_ledger_takes_a_number_once_and_a_task_once(journal: Journal) -> None:
    with journal.transaction():
        accept(journal, upload(1))
    with pytest.raises(sqlite3.IntegrityError), journal.transaction():
        accept(journal, upload(1, task="f" * 16))
    with pytest.raises(sqlite3.IntegrityError), journal.transaction():
        accept(journal, upload(2, task=f"{1:016x}"))


def test_a_row_is_merged_once_and_its_body_goes_in_the_same_transaction(journal: Journal) -> None:
    with journal.transaction():
        accept(journal, upload(1))
        accept(journal, upload(2, device="dev-0"))
    rows = journal.updates(1, "train")
    assert [(row.device, row.seq) for row in rows] == [("dev-0", 2), ("dev-1", 1)]
    with journal.transaction():
        journal.mark_merged(rows, 1, keep_bodies=False)
    assert journal.updates(1, "train") == []
    assert journal.body("dev-1", upload(1).upload) == b""
    with pytest.raises(JournalError, match="merged or set aside before"), journal.transaction():
        journal.mark_merged(rows, 2, keep_bodies=False)
    assert journal.last_norms(2) == [1.0, 1.0]


def test_the_status_counts_each_update_under_one_fate(journal: Journal, tmp_path: Path) -> None:
    with journal.transaction():
        for seq in (1, 2, 3):
            accept(journal, upload(seq))
        journal.save_presence(Presence("dev-1", "0badcafe00000000", "b" * 16, 1, online=True, seen=3))
        rows = journal.updates(1, "train")
        journal.mark_merged(rows[:1], 1, keep_bodies=False)
        journal.set_aside(rows[1:2], "phase_closed", keep_bodies=False)
        for _ in range(2):
            journal.refuse("dev-1", "name", 1, "too_large", "1 GiB", 9)
        journal.raise_alarm("seq_conflict", "dev-1", "twice", 9)
        journal.save_round(RoundRecord(round=1, program="p", opened=1000, closed=3000, start="s", phase="train"))
        journal.add_traffic(1, "dev-1", 10, 20)
    for status in (journal.status(3), read_journal(tmp_path, 3)):
        assert status is not None
        assert (status.accepted, status.merged, status.pending) == (3, 1, 1)
        assert (status.set_aside, status.refused) == ({"phase_closed": 1}, {"too_large": 1})
        (device,) = status.devices
        assert (device.bytes_up, device.bytes_down, device.merged, device.refused) == (10, 20, 1, 1)
        assert [(alarm.kind, alarm.count) for alarm in status.alarms] == [("seq_conflict", 1)]
        (record,) = status.history
        assert (record.accepted, record.merged, record.seconds, record.traffic) == (
            3,
            1,
            2.0,
            {"dev-1": (10, 20)},
        )


def test_a_second_process_on_the_same_journal_is_refused_by_name(journal: Journal, tmp_path: Path) -> None:
    assert is_running(tmp_path)
    program = (
        "import sys; from pathlib import Path; from tests.aggregator.test_journal import IDENTITY\n"
        "from aggregator.journal import Journal\n"
        "Journal(Path(sys.argv[1]), IDENTITY)"
    )
    other = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=60)
    assert other.returncode == 1
    assert "JournalBusyError" in other.stderr
    assert "another process (pid" in other.stderr
    journal.close()
    assert not is_running(tmp_path)
    Journal(tmp_path, IDENTITY).close()
    assert issubclass(JournalBusyError, JournalError)


def test_a_journal_of_another_job_is_refused(journal: Journal, tmp_path: Path) -> None:
    journal.close()
    with pytest.raises(JournalError, match=r"belongs to program 'tiny/head/float', the job file says 'other'"):
        Journal(tmp_path, replace(IDENTITY, program="other"))


def test_a_journal_of_a_newer_program_is_refused(journal: Journal, tmp_path: Path) -> None:
    journal.close()
    with sqlite3.connect(tmp_path / "journal.sqlite") as db:
        db.execute("PRAGMA user_version=9")
    with pytest.raises(JournalError, match="schema version 9"):
        Journal(tmp_path, IDENTITY)


def test_a_full_disk_rolls_back_the_batch_and_keeps_what_was_accepted(journal: Journal) -> None:
    with journal.transaction():
        accept(journal, upload(1))
    journal.limit_pages(journal.pages() + 4)
    with pytest.raises(DiskFullError, match="free some disk space"):
        store_large(journal)
    assert journal.offers() == []
    assert journal.body("dev-1", upload(1).upload) == b"abcdefghij"
    journal.limit_pages(None)
    store_large(journal)
    assert len(journal.offers()) == 1


def test_a_disk_that_fails_while_it_has_room_is_not_taken_for_a_full_one(journal: Journal) -> None:
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, unlimited[1]))  # every write fails, and not for want of space
    try:
        with pytest.raises(StorageError, match="check the disk") as told:
            store_large(journal)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert not isinstance(told.value, DiskFullError)
    store_large(journal)
    assert len(journal.offers()) == 1


def test_old_numbers_are_compacted_below_a_floor_without_changing_the_counts(journal: Journal) -> None:
    with journal.transaction():
        for seq in range(1, 1089):
            accept(journal, upload(seq))
            journal.mark_merged(journal.updates(1, "train"), 1, keep_bodies=False)
        for seq in range(1, 1089):
            accept(journal, upload(seq, "dev-2", phase="evaluate"))
            journal.mark_merged(journal.updates(1, "evaluate"), 1, keep_bodies=False)
        journal.save_round(RoundRecord(1, "p", 0, "s" * 64, "train", merge={"updates": 1088}))
    assert journal.floor("dev-1", "0badcafe00000000") == 1088 - 1024
    assert journal.recorded("dev-1", "0badcafe00000000", 64) is None
    status = journal.status(1)
    assert (status.accepted, status.merged, status.trained, status.measured) == (2176, 2176, 1088, 1088)
    assert status.duplicated == 0
    with journal.transaction():  # a merge that folded one more than there were
        journal.save_round(RoundRecord(1, "p", 0, "s" * 64, "train", merge={"updates": 1089}))
    assert journal.status(1).duplicated == 1


_WRITER = """
import os, sys
from pathlib import Path
from tests.aggregator.test_journal import IDENTITY, accept, upload
from aggregator.journal import Journal
journal = Journal(Path(sys.argv[1]), IDENTITY)
for seq in range(1, 10_000):
    with journal.transaction():
        accept(journal, upload(seq))
    print(seq, flush=True)
"""


@pytest.mark.faults
def test_what_was_committed_survives_sigkill_and_nothing_is_half_written(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    told = 0
    for line in writer.stdout:
        told = int(line)
        if told == 40:
            writer.send_signal(signal.SIGKILL)
            break
    told = max([told, *(int(line) for line in writer.stdout)])
    writer.wait(timeout=30)
    journal = Journal(tmp_path, IDENTITY)
    rows = journal.updates(1, "train")
    assert sorted(row.seq for row in rows) == list(range(1, len(rows) + 1))
    assert len(rows) >= told
    assert journal.offers() == []
    assert all(journal.body(row.device, row.upload) == b"abcdefghij" for row in rows)


def test_the_journal_says_what_a_device_was_told_to_train_and_what_came_since(journal: Journal) -> None:
    with journal.transaction():
        for item in (upload(1), upload(2, phase="evaluate", task="t2"), upload(1, device="dev-2")):
            journal.store_offer(item)
            accept(journal, item)
        programs = {"dev-1": ("net/qat4", "free", 5), "dev.2-x": ("net/ptq4", "too-slow", 5)}
        journal.save_round(RoundRecord(round=1, program="p", opened=5, start="s", phase="train", programs=programs))
    assert journal.assigned(1, "dev-1") == "net/qat4"
    assert journal.assigned(1, "dev.2-x") == "net/ptq4"
    assert journal.assigned(1, "dev-9") is None
    assert journal.assigned(2, "dev-1") is None
    last, rows = journal.accepted_since(0)
    assert [(row.device, row.phase) for row, _ in rows] == [("dev-1", "train"), ("dev-2", "train")]
    assert journal.accepted_since(last) == (last, [])
