"""What happens to the bytes of an update: they are checked, folded into a candidate, and the candidate is
judged.

Memory: one update and two models at a time. Everything is read from the journal and the blob store, so that
it can be repeated after a crash and gives the same bytes: updates are folded in sorted (device, seq) order,
and what a check depends on (base, table, norms of the last closed round) does not change while a phase is
open.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from aggregator.admission import Refused, admit, change_norm, norm_bound
from aggregator.blobs import BlobStore
from aggregator.gate import judge
from aggregator.intake import OpenUpload
from aggregator.journal import Journal, LedgerRow
from aggregator.merge import Contribution, empty, merger_for
from aggregator.validation import evaluate_file
from edge_sdk.bundle import Bundle, Program
from edge_sdk.errors import EdgewiseError
from edge_sdk.tensors import pack, unpack
from edge_sdk.update import decode_update

if TYPE_CHECKING:
    from aggregator.job import Job

log = logging.getLogger(__name__)


class BodyRefusedError(EdgewiseError):
    """The body of an update cannot be accepted. `again`: another transfer may help, for its digest was
    wrong."""

    def __init__(self, detail: str, *, again: bool = False) -> None:
        super().__init__(detail)
        self.detail = detail
        self.again = again


@dataclass(frozen=True)
class Checked:
    """What the ledger notes about an accepted body."""

    norm: float | None
    evidence: tuple[float, float] | None


@dataclass(frozen=True)
class Folded:
    """A merge: the candidate (digest of a stored blob), the rows it covers, and what the rule reports."""

    candidate: str
    rows: Sequence[LedgerRow]
    report: Mapping[str, Any]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Judgement:
    """The gate's verdict. Scores are shares; `evidence`: device -> (sum, count) of the candidate."""

    accepted: bool
    reason: str
    before: float | None = None
    after: float | None = None
    evidence: Mapping[str, Sequence[float]] = field(default_factory=dict)
    validation_before: float | None = None
    validation_after: float | None = None


class Fold:
    """Checks, folds and judges for one job."""

    def __init__(self, job: Job, bundle: Bundle, journal: Journal, blobs: BlobStore) -> None:
        self._job, self._bundle, self._journal, self._blobs = job, bundle, journal, blobs
        self._program = bundle.program(job.program)
        self._bounds: dict[int, float] = {}  # of the present round
        self._start: tuple[str, dict[str, np.ndarray[Any, Any]]] = ("", {})

    def check(self, upload: OpenUpload) -> Checked:
        """Check a complete upload: digest, then content. Raises `BodyRefusedError`."""
        hasher = hashlib.sha256()
        for chunk in self._journal.chunks(upload.device, upload.upload):
            hasher.update(chunk)
        if hasher.hexdigest() != upload.digest:
            raise BodyRefusedError("the bytes do not have the digest of the offer", again=True)
        program = self._phase_program(upload.phase)
        start = self._model(upload.start)
        trains = upload.phase == "train"
        bound = self._norm_bound(upload.round, start) if trains else None
        body = self._journal.body(upload.device, upload.upload)
        try:
            tensors = admit(body, program, self._bundle.tensors, start, start_digest=upload.start, norm_bound=bound)
        except Refused as refused:
            raise BodyRefusedError(f"{refused.reason}: {refused.detail}") from refused
        if trains:
            return Checked(norm=change_norm(tensors, start), evidence=None)
        if program.score is None:
            return Checked(norm=None, evidence=None)
        return Checked(norm=None, evidence=_counts(tensors, program))

    def merge(self, number: int, model: str) -> Folded:
        """Fold the accepted updates of a round into a candidate and store it. Raises `MergeError`,
        `StorageError`."""
        program, table = self._program, self._bundle.tensors
        start = self._model(model)
        merger = merger_for(self._job.merge.rule, program, table, self._job.merge, self._job.seed, number)
        rows = self._journal.updates(number, "train")
        state = empty()
        for row in rows:
            body = self._journal.body(row.device, row.upload)
            values = decode_update(body, program, table, start, model)
            state = state.add(Contribution(row.device, row.seq, row.num_examples, start, values))
        result = merger.finish(state, start)
        candidate = self._blobs.put(pack({**start, **result.tensors}))
        report = {**result.report, "updates": len(rows), "examples": sum(row.num_examples for row in rows)}
        return Folded(candidate, rows, report, _mean_metrics(rows))

    def judge(self, number: int, model: str, candidate: str) -> Judgement:
        """Compare the candidate with the model it would replace, on the evidence there is."""
        program = self._phase_program("evaluate")
        before, after = self._journal.evidence(model), self._journal.evidence(candidate)
        gate = self._job.gate
        better = "higher" if program.score is None else program.score.better
        checked_before = checked_after = None
        if gate.validation is not None:
            checked_after = evaluate_file(self._bundle, program, self._model(candidate), gate.validation)
            checked_before = evaluate_file(self._bundle, program, self._model(model), gate.validation)
        verdict = judge(
            before,
            after,
            better=better,
            tolerance=gate.tolerance,
            min_examples=gate.min_examples,
            validation_before=checked_before,
            validation_after=checked_after,
        )
        if number == 0:
            reason = f"{len(after)} devices measured the initial model"
            return Judgement(True, reason, after=verdict.after, evidence=after, validation_after=_share(checked_after))
        return Judgement(
            verdict.accepted,
            verdict.reason,
            verdict.before,
            verdict.after,
            after,
            _share(checked_before),
            _share(checked_after),
        )

    def _phase_program(self, phase: str) -> Program:
        if phase == "evaluate" and self._program.evaluate is not None:
            return self._bundle.program(self._program.evaluate)
        return self._program

    def _model(self, digest: str) -> dict[str, np.ndarray[Any, Any]]:
        if self._start[0] != digest:
            self._start = (digest, unpack(self._blobs.read(digest))[0])
        return self._start[1]

    def _norm_bound(self, number: int, start: Mapping[str, np.ndarray[Any, Any]]) -> float | None:
        if number not in self._bounds:
            fixed = self._job.limits.norm
            bound = fixed or norm_bound(self._journal.last_norms(number), start)
            self._bounds = {number: bound}
        return self._bounds[number]


def _share(counts: tuple[float, float] | None) -> float | None:
    return None if counts is None else counts[0] / counts[1]


def _counts(tensors: Mapping[str, np.ndarray[Any, Any]], program: Program) -> tuple[float, float]:
    """Sum and count of an evaluation, from the accumulators its program names."""
    assert program.score is not None
    total, count = float(np.sum(tensors[program.score.sum])), float(np.sum(tensors[program.score.count]))
    if count <= 0:
        raise BodyRefusedError(f"the evaluation counted {count:g} examples, at least 1 was expected")
    return total, count


def _mean_metrics(rows: Sequence[LedgerRow]) -> dict[str, float]:
    """The devices' own metrics, weighted by examples; only those that all of them sent."""
    names = set.intersection(*(set(row.metrics) for row in rows)) if rows else set()
    weight = sum(row.num_examples for row in rows)
    return {name: sum(row.metrics[name] * row.num_examples for row in rows) / weight for name in sorted(names)}
