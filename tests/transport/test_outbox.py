"""The outbox and the downloads: nothing half stored, nothing twice, nothing lost when the disk is full."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.downloads import Downloads
from edge_sdk.errors import StorageError, TaskError
from edge_sdk.outbox import Draft, Outbox
from edge_sdk.tensors import digest
from edge_sdk.wire import CHUNK


def sign(draft: Draft) -> bytes:
    return f"offer of {draft.upload}".encode()


def commit(outbox: Outbox, task: str = "aa", body: bytes = b"body", number: int = 1, **changes):
    options = {"program": "p", "feedback": {}, "sign": sign, **changes}
    return outbox.commit(task=task, number=number, body=body, **options)


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path / "outbox.sqlite")


def test_a_committed_update_survives_with_offer_body_and_residuals(tmp_path: Path, outbox: Outbox) -> None:
    body = os.urandom(2 * CHUNK + 5)
    entry = commit(outbox, body=body, feedback={"w": np.ones(3, np.float32)})
    outbox.close()
    again = Outbox(tmp_path / "outbox.sqlite")
    assert again.outbox_id == outbox.outbox_id
    assert again.entries() == [entry]
    assert b"".join(again.chunk(entry.upload, index) or b"" for index in range(entry.chunks)) == body
    assert again.chunk(entry.upload, 3) is None
    assert entry.upload == f"{outbox.outbox_id[:8]}-00000001-{digest(body)[:12]}"
    assert again.task_done("aa")
    assert again.feedback("p")["w"].tolist() == [1, 1, 1]


def test_a_task_is_done_once(outbox: Outbox) -> None:
    commit(outbox)
    with pytest.raises(TaskError, match="task aa was done before"):
        commit(outbox, body=b"other")
    assert len(outbox.entries()) == 1


def test_a_contradiction_is_not_told_as_a_lack_of_space(tmp_path: Path, outbox: Outbox) -> None:
    commit(outbox)
    with contextlib.closing(sqlite3.connect(tmp_path / "outbox.sqlite")) as other, other:
        other.execute("DELETE FROM done")
    with pytest.raises(StorageError, match="UNIQUE") as raised:
        commit(outbox, body=b"other")
    assert "free some disk space" not in str(raised.value)


@pytest.mark.parametrize(
    "read",
    [
        Outbox.summary,
        Outbox.entries,
        Outbox.parts,
        lambda outbox: outbox.meta("x"),
        lambda outbox: outbox.chunk("x", 0),
    ],
)
def test_an_outbox_that_cannot_be_read_says_so(outbox: Outbox, read: Callable[[Outbox], Any]) -> None:
    outbox.close()
    with pytest.raises(StorageError, match=r"outbox.sqlite: the outbox cannot be read .*: open it again"):
        read(outbox)


def test_a_number_is_never_used_twice(outbox: Outbox) -> None:
    first = commit(outbox)
    outbox.delete(first.upload, "accepted")
    assert outbox.task_done("aa")
    assert commit(outbox, task="bb").seq == 2
    assert not outbox.delete(first.upload, "accepted")
    summary = outbox.summary()
    assert (summary.made, summary.accepted, summary.rejected, summary.entries) == (2, 1, 0, 1)


def test_quarantine_keeps_the_sixteen_newest_offers(outbox: Outbox) -> None:
    for number in range(20):
        outbox.quarantine(commit(outbox, task=f"{number:02d}").upload, "bad_signature")
    assert len(outbox.quarantined()) == 16
    assert outbox.entries() == []


def test_a_full_disk_stores_nothing_and_loses_nothing(outbox: Outbox) -> None:
    entry = commit(outbox, body=os.urandom(CHUNK))
    outbox.limit_pages(outbox.pages())
    with pytest.raises(StorageError, match="free some disk space"):
        commit(outbox, task="bb", body=os.urandom(CHUNK), feedback={"w": np.ones(3, np.float32)})
    assert outbox.entries() == [entry]
    assert not outbox.task_done("bb")
    assert outbox.feedback("p") == {}
    outbox.limit_pages(None)
    assert commit(outbox, task="bb", body=b"now").seq == 2


def test_caps_are_known_before_a_task_begins(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "o", max_entries=2, max_bytes=1000)
    assert outbox.has_room(1000)
    assert not outbox.has_room(1001)
    commit(outbox, body=bytes(600))
    assert not outbox.has_room(500)
    commit(outbox, task="bb", body=b"x")
    assert not outbox.has_room(1)


def test_a_signer_that_fails_leaves_nothing(outbox: Outbox) -> None:
    def fail(_draft: Draft) -> bytes:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        commit(outbox, sign=fail)
    assert outbox.entries() == []
    assert commit(outbox).seq == 1


def test_a_killed_process_leaves_a_whole_update_or_none(tmp_path: Path) -> None:
    program = (
        "import sys, os; from pathlib import Path; from edge_sdk.outbox import Outbox\n"
        "outbox = Outbox(Path(sys.argv[1])); print(flush=True)\n"
        "for n in range(10000): outbox.commit(task=f'{n:016x}', number=1, program='p', body=os.urandom(200_000), feedback={}, sign=lambda d: b'o')\n"
    )
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "o")], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.3)
        child.kill()
        child.wait()
        (tmp_path / "o").exists()
        outbox = Outbox(tmp_path / "o")
        entries = outbox.entries()
        assert entries
        for entry in entries:
            assert digest(b"".join(outbox.chunk(entry.upload, i) or b"" for i in range(entry.chunks))) == entry.digest
            assert outbox.task_done(entry.task)
        for entry in entries:
            outbox.delete(entry.upload, "accepted")
        outbox._db.execute("DELETE FROM done")
        outbox.close()


# Downloads.


@pytest.fixture
def downloads(tmp_path: Path, outbox: Outbox) -> Downloads:
    return Downloads(tmp_path / "blobs", outbox)


def chunks_of(data: bytes) -> list[bytes]:
    return [data[i : i + CHUNK] for i in range(0, len(data), CHUNK)]


def test_chunks_in_any_order_make_the_blob(downloads: Downloads) -> None:
    data = os.urandom(10 * CHUNK + 7)
    name = digest(data)
    parts = chunks_of(data)
    assert downloads.missing(name, len(data)) == frozenset(range(11))
    for index in (10, 3, 0, *range(11)):
        assert downloads.store(name, len(data), index, parts[index])
    assert downloads.missing(name, len(data)) == frozenset()
    assert downloads.path(name) is None
    assert downloads.finish(name)
    path = downloads.path(name)
    assert path is not None
    assert path.read_bytes() == data


def test_a_restart_goes_on_where_the_bitmap_stands(tmp_path: Path, outbox: Outbox, downloads: Downloads) -> None:
    data = os.urandom(20 * CHUNK)
    name, parts = digest(data), chunks_of(data)
    for index in range(10):  # a window of eight is marked, two are on disk only
        downloads.store(name, len(data), index, parts[index])
    again = Downloads(tmp_path / "blobs", outbox)
    assert again.missing(name, len(data)) == frozenset(range(8, 20))


def test_a_wrong_digest_drops_everything(downloads: Downloads) -> None:
    data = os.urandom(CHUNK + 1)
    name = digest(b"other")
    for index, part in enumerate(chunks_of(data)):
        downloads.store(name, len(data), index, part)
    assert not downloads.finish(name)
    assert downloads.missing(name, len(data)) == frozenset({0, 1})


def test_chunks_that_do_not_belong_are_not_stored(downloads: Downloads) -> None:
    name = digest(b"x")
    for index, size in ((2, 1), (0, CHUNK - 1), (1, CHUNK), (-1, CHUNK)):
        assert not downloads.store(name, CHUNK + 1, index, bytes(size))


def test_prune_keeps_what_is_named(tmp_path: Path, outbox: Outbox, downloads: Downloads) -> None:
    kept, gone = b"kept", b"gone"
    for data in (kept, gone):
        downloads.put(digest(data), data)
    downloads.store(digest(b"part"), 2 * CHUNK, 0, bytes(CHUNK))
    downloads.prune({digest(kept)})
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == [digest(kept)]
    assert outbox.parts() == []


def test_a_power_cut_after_any_write_leaves_a_download_that_can_be_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not flushed when the bitmap was committed is gone; the bitmap must not know of it."""
    data = os.urandom(11 * CHUNK + 5)
    name, parts = digest(data), chunks_of(data)
    outbox = Outbox(tmp_path / "outbox.sqlite")
    downloads = Downloads(tmp_path / "blobs", outbox)
    order: list[str] = []
    durable: bytes | None = None  # of the part file, on a disk that keeps nothing before it must
    moments: list[tuple[bytes | None, bytes]] = []
    flush, save, store = os.fdatasync, outbox.save_part, downloads.store

    def flushed(handle: int) -> None:
        nonlocal durable
        flush(handle)
        durable = (tmp_path / "blobs" / f"{name}.part").read_bytes()
        order.append("fdatasync")

    def saved(digest: str, size: int, bitmap: bytes) -> None:
        save(digest, size, bitmap)
        moments.append((durable, bitmap))
        order.append("bitmap")

    monkeypatch.setattr(os, "fdatasync", flushed)
    monkeypatch.setattr(outbox, "save_part", saved)
    for index, part in enumerate(parts):
        order.append("bytes")
        store(name, len(data), index, part)
        moments.append((durable, moments[-1][1]))
    monkeypatch.undo()
    assert order == ["bytes", "bitmap", *["bytes"] * 7, "fdatasync", "bitmap", *["bytes"] * 4, "fdatasync", "bitmap"]
    for number, (left, bitmap) in enumerate(moments):
        folder = tmp_path / f"after-{number}"
        (folder / "blobs").mkdir(parents=True)
        if left is not None:
            (folder / "blobs" / f"{name}.part").write_bytes(left)
        box = Outbox(folder / "outbox.sqlite")
        box.save_part(name, len(data), bitmap)
        again = Downloads(folder / "blobs", box)
        for index in again.missing(name, len(data)):
            again.store(name, len(data), index, parts[index])
        assert again.finish(name), f"moment {number}: the bitmap promised what the disk did not hold"
        box.close()
    outbox.close()
