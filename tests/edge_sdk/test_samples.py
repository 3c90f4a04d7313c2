"""The sample store: bounded, checked, durable."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_sdk.bundle import HeldOut
from edge_sdk.errors import SampleError, StorageError
from edge_sdk.fields import FieldSpec
from edge_sdk.samples import SampleStore

FIELDS = (FieldSpec("d.x", "float32", (2, 3)), FieldSpec("d.y", "int64", (), classes=4))
SIZE = 2 * 3 * 4 + 8


def samples(count: int, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    x = np.arange(first, first + count, dtype=np.float32)[:, None, None] * np.ones((1, 2, 3), np.float32)
    return x, np.arange(count) % 4


def test_samples_come_back_in_the_order_asked_for(tmp_path: Path) -> None:
    store = SampleStore(tmp_path / "s.db", FIELDS, max_bytes=10_000)
    x, y = samples(10)
    ids = store.add_many(x, y)
    wanted = [7, 0, 7]
    batch = store.read(ids[wanted])
    np.testing.assert_array_equal(batch["d.x"], x[wanted])
    np.testing.assert_array_equal(batch["d.y"], y[wanted])


def test_the_oldest_go_when_the_store_is_full(tmp_path: Path) -> None:
    store = SampleStore(tmp_path / "s.db", FIELDS, max_bytes=5 * SIZE)
    for start in (0, 3, 6):
        store.add_many(*samples(3, start))
    assert store.bytes == 5 * SIZE
    kept = store.read(store.train_ids(HeldOut()))
    np.testing.assert_array_equal(kept["d.x"][:, 0, 0], [4, 5, 6, 7, 8])


def test_the_last_fifth_of_each_recording_is_held_out_and_the_gap_belongs_to_nobody(tmp_path: Path) -> None:
    store = SampleStore(tmp_path / "s.db", FIELDS, max_bytes=10_000)
    one = store.add_many(*samples(10), recording="one")
    two = store.add_many(*samples(7), recording="two")
    short = store.add_many(*samples(3), recording="short")
    rule = HeldOut(0.2, 1)
    assert sorted(store.held_out_ids(rule)) == sorted([*one[8:], *two[6:]])
    assert sorted(store.train_ids(rule)) == sorted([*one[:7], *two[:5], *short])


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((2, 4), np.float32), 1, "shape"),
        (np.zeros((2, 3), np.float64), 1, "dtype float64, expected float32"),
        (np.full((2, 3), np.nan, np.float32), 1, "NaN"),
        (np.zeros((2, 3), np.float32), 9, "label 9, expected 0 to 3"),
        (np.zeros((2, 3), np.float32), 1.5, "dtype float64, expected int64"),
    ],
)
def test_a_bad_sample_is_refused_and_nothing_is_stored(tmp_path: Path, x: np.ndarray, y: float, message: str) -> None:
    store = SampleStore(tmp_path / "s.db", FIELDS, max_bytes=10_000)
    with pytest.raises(SampleError, match=message):
        store.add(x, y)
    assert len(store) == 0


def test_one_bad_sample_of_many_keeps_all_of_them_out(tmp_path: Path) -> None:
    store = SampleStore(tmp_path / "s.db", FIELDS, max_bytes=10_000)
    x, y = samples(5)
    x[3, 0, 0] = np.inf
    with pytest.raises(SampleError, match="d.x of sample 3 holds NaN or infinity"):
        store.add_many(x, y)
    assert len(store) == 0


def test_samples_of_another_bundle_are_not_mixed_in(tmp_path: Path) -> None:
    SampleStore(tmp_path / "s.db", FIELDS, max_bytes=10_000).close()
    with pytest.raises(SampleError, match="give this bundle another store folder"):
        SampleStore(tmp_path / "s.db", FIELDS[:1], max_bytes=10_000)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="cannot be opened"):
        SampleStore(tmp_path / "file" / "s.db", FIELDS, max_bytes=10_000)


def test_a_full_disk_loses_nothing_that_was_stored(tmp_path: Path) -> None:
    store = SampleStore(tmp_path / "s.db", FIELDS, max_bytes=1 << 20)
    kept = store.add_many(*samples(50))
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(StorageError, match="free some disk space"):
        store.add_many(*samples(2000))
    np.testing.assert_array_equal(store.read(kept)["d.x"], samples(50)[0])
    store._db.execute("PRAGMA max_page_count=1000000")
    store.add_many(*samples(2000))
    assert len(store) == 2050


def test_what_was_recorded_survives_sigkill(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.edge_sdk.test_samples import *\n"
        "store = SampleStore(Path(sys.argv[1]), FIELDS, max_bytes=1 << 20)\n"
        "for i in range(100000):\n store.add(np.full((2, 3), i, np.float32), 1); print(i, flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "s.db")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= 20:
            break
    os.kill(child.pid, signal.SIGKILL)
    told = [int(line), *[int(rest) for rest in child.stdout.read().split()]]
    child.wait()
    store = SampleStore(tmp_path / "s.db", FIELDS, max_bytes=1 << 20)
    values = store.read(store.train_ids(HeldOut()))["d.x"][:, 0, 0]
    np.testing.assert_array_equal(values, np.arange(len(values)))
    assert len(values) >= max(told) + 1
