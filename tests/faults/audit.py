"""The books of a job after everything was killed: what devices made, what the ledger holds, what the models say.

"Exact" means: every update that an outbox made stands in the ledger once or was refused with a reason, none in both; every
row of the ledger was merged once or set aside with a reason; each merged model is the weighted mean of exactly those rows,
made again here from the kept bodies, with nothing but NumPy.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aggregator.journal import RoundRecord
from aggregator.merge import Contribution
from aggregator.merge.sums import Sums
from aggregator.service import MODEL_FILE
from edge_sdk.bundle import Bundle
from edge_sdk.tensors import digest, pack
from edge_sdk.update import decode_update
from tests.system.site import Site
from tests.tiny_bundle import HEAD


@dataclass(frozen=True)
class Books:
    """Updates by fate; `models` is how many merges were made again and found equal."""

    made: int
    accepted: int
    merged: int
    set_aside: int
    refused: int
    models: int


def audit(site: Site, *, allowed: frozenset[str] = frozenset({"round_closed"})) -> Books:
    """Assert that the books are exact; the job keeps its updates (`journal.keep_updates`) and every process has ended.

    `allowed`: the reasons for which an honest update may have been refused.
    """
    status = site.status()
    assert status.duplicated == 0
    assert status.pending == 0
    made = 0
    with closing(_open(site.folder / "state" / "journal.sqlite")) as journal:
        ledger = journal.execute("SELECT device, outbox_id, seq, upload, task, merged_in, set_aside FROM ledger")
        rows = ledger.fetchall()
        refused = journal.execute("SELECT device, upload, reason FROM refusal").fetchall()
        for device in site.ids:
            made += _audit_device(site, device, rows, refused, allowed)
        models = _audit_models(site, journal, [record for record in status.history if record.merge])
        orphans = "SELECT count(*) FROM part WHERE (device, upload) NOT IN (SELECT device, upload FROM ledger)"
        assert journal.execute(orphans).fetchone()[0] == 0
    assert all((row[5] is None) != (row[6] is None) for row in rows)
    return Books(
        made=made,
        accepted=len(rows),
        merged=sum(row[5] is not None for row in rows),
        set_aside=sum(row[6] is not None for row in rows),
        refused=len(refused),
        models=models,
    )


def _audit_device(site: Site, device: str, rows: list[tuple], refused: list[tuple], allowed: frozenset[str]) -> int:
    mine = [row for row in rows if row[0] == device]
    with closing(_open(site.folder / device / "store" / "outbox.sqlite")) as db:
        meta = dict(db.execute("SELECT key, value FROM meta"))
        left = db.execute("SELECT upload FROM entry").fetchall()
    made, accepted, rejected = (int(meta.get(f"count.{name}", 0)) for name in ("made", "accepted", "rejected"))
    assert left == [], f"{device} still waits for a verdict"
    assert {row[1] for row in mine} <= {meta["outbox_id"]}
    counted = Counter(row[2] for row in mine)
    turned_away = {int(upload.split("-")[1]): reason for who, upload, reason in refused if who == device}
    assert set(turned_away.values()) <= allowed, (device, turned_away)
    assert max(Counter(row[4] for row in mine).values(), default=0) <= 1, f"a task of {device} was answered twice"
    assert max(counted.values(), default=0) <= 1, f"an update of {device} was counted twice"
    assert set(counted) | set(turned_away) == set(range(1, made + 1)), f"an update of {device} was lost"
    assert not set(counted) & set(turned_away)
    assert (accepted, rejected) == (len(counted), len(turned_away))
    return made


def _audit_models(site: Site, journal: sqlite3.Connection, merges: list[RoundRecord]) -> int:
    """Make every merge again from the kept bodies: the same bytes, and the weighted means of plain float64 arithmetic."""
    with Bundle.open(site.bundle) as bundle:
        program, tensor_table = bundle.program(HEAD), bundle.tensors
        models = {digest(bundle.start_blob(program)): bundle.initial(program)}
    for record in merges:
        start = models[record.start]
        rows = journal.execute(
            "SELECT device, upload, num_examples FROM ledger WHERE merged_in=? AND phase='train' ORDER BY device, seq",
            (record.round,),
        ).fetchall()
        assert record.merge["updates"] == record.merged == len(rows)
        assert len({row[0] for row in rows}) == len(rows)
        total = sum(row[2] for row in rows)
        means = {name: np.zeros(value.shape, np.float64) for name, value in start.items()}
        state = Sums(list(start))
        for device, upload, examples in rows:
            body = _body(journal, device, upload)
            trained = decode_update(body, program, tensor_table, start, record.start, allowed=["float32"])
            state.add(Contribution(device, 1, examples, start, trained))
            for name, value in trained.items():
                means[name] += examples / total * value.astype(np.float64)
        candidate = {name: state.mean(name).astype(np.float32) for name in start}
        for name, value in means.items():
            np.testing.assert_allclose(candidate[name], value, rtol=0, atol=2.0**-22 * max(1.0, np.abs(value).max()))
        name = digest(pack(candidate))
        assert name == record.candidate, f"round {record.round} merged something else than its updates"
        assert record.model == (name if record.outcome == "accepted" else record.start)
        models[name] = candidate
    if merges:
        final = (site.folder / "state" / MODEL_FILE).read_bytes()
        assert digest(final) == merges[-1].model
    return len(merges)


def _body(journal: sqlite3.Connection, device: str, upload: str) -> bytes:
    rows = journal.execute("SELECT bytes FROM part WHERE device=? AND upload=? ORDER BY idx", (device, upload))
    return b"".join(bytes(row[0]) for row in rows)


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=10)
