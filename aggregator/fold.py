"""What happens to the bytes of an update: they are checked, folded into a candidate, and the candidate is
judged.

Memory: the merge state and a few updates. Everything is read from the journal and the blob store, so that
it can be repeated after a crash and gives the same bytes: bodies are streamed into the state of the merge
rule in sorted (device, seq) order, and what a check depends on (base, table, norms of the last closed round)
does not change while a phase is open.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from aggregator.admission import Refused, admit, change_norm, norm_bound
from aggregator.assign import assigner_for
from aggregator.blobs import BlobStore
from aggregator.gate import judge
from aggregator.intake import OpenUpload
from aggregator.job import Job, plan_of
from aggregator.journal import Journal, LedgerRow
from aggregator.merge import Contribution, MergeError, Merger, merge, merger_for
from aggregator.merge.alarms import MERGES, Warned, alarms
from aggregator.merge.server import server_step
from aggregator.validation import evaluate_file
from edge_sdk.bundle import Bundle, Program
from edge_sdk.errors import EdgewiseError
from edge_sdk.tensors import pack, unpack
from edge_sdk.update import decode_update

log = logging.getLogger(__name__)

_MODELS_KEPT = 8  # cut models in memory: one for each program that trains, and a few that are late


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
    """A merge: the candidate (digest of a stored blob), the rows it covers, what the rule reports, and what that alarms about."""

    candidate: str
    rows: Sequence[LedgerRow]
    report: Mapping[str, Any]
    metrics: Mapping[str, float]
    alarms: Sequence[Warned] = ()


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
        self.assigner = assigner_for(job, bundle)
        self._bounds: dict[int, float] = {}  # of the present round
        self._models: OrderedDict[str, dict[str, np.ndarray[Any, Any]]] = OrderedDict()
        self._starts: dict[tuple[str, str], str] = {}  # (model, program) -> digest of what the program starts from

    def check(self, upload: OpenUpload, number: int) -> Checked:
        """Check a complete upload in round `number`: digest, then content. Raises `BodyRefusedError`."""
        hasher = hashlib.sha256()
        for chunk in self._journal.chunks(upload.device, upload.upload):
            hasher.update(chunk)
        if hasher.hexdigest() != upload.digest:
            raise BodyRefusedError("the bytes do not have the digest of the offer", again=True)
        program = self.program(upload.round, upload.phase, upload.device)
        start = self._model(upload.start)
        trains = upload.phase == "train"
        bound = self._norm_bound(upload.round, start) if trains else None
        # float32 loses nothing, so no task needs to allow it.
        kinds = ("float32", self._job.task.encoding, *self._job.task.encodings_allowed) if trains else ("float32",)
        body = self._journal.body(upload.device, upload.upload)
        try:
            tensors = admit(
                body,
                program,
                self._bundle.tensors,
                start,
                start_digest=upload.start,
                norm_bound=bound,
                encodings=kinds,
            )
        except Refused as refused:
            raise BodyRefusedError(f"{refused.reason}: {refused.detail}") from refused
        if trains:
            found = self._contribution(upload, start, tensors, number - upload.round)
            try:
                self.merger(number).check(found)
            except MergeError as error:
                raise BodyRefusedError(f"stale_gauge: {error}") from error
            return Checked(norm=change_norm(tensors, start, program, self._bundle.tensors), evidence=None)
        if program.score is None:
            return Checked(norm=None, evidence=None)
        return Checked(norm=None, evidence=_counts(tensors, program))

    def merge(self, number: int, model: str, tasks: frozenset[str] | None = None) -> Folded:
        """Fold the accepted updates of a round, or those for `tasks`, into a candidate and store it. Raises `MergeError`,
        `StorageError`."""
        start = self._model(model)
        rows = [row for row in self._journal.unmerged(number) if tasks is None or row.task in tasks]
        merger = self.merger(number)
        result = merge(merger, self._contributions(rows, merger, number, model), start)
        tensors, moments = result.tensors, None
        if self._job.merge.server.optimizer != "none":
            tensors, moments = self._server_step(number, model, start, tensors)
        candidate = self._blobs.put(pack({**start, **tensors}))
        report = {
            **result.report,
            "late": sum(row.round < number for row in rows),
            "moments": moments,
            "updates": len(rows),
            "examples": sum(row.num_examples for row in rows),
        }
        earlier = [self._journal.round(before) for before in range(max(1, number - MERGES + 1), number)]
        reports = [*(record.merge for record in earlier if record is not None), report]
        return Folded(candidate, rows, report, _mean_metrics(rows), alarms(reports))

    def judge(self, number: int, model: str, candidate: str) -> Judgement:
        """Compare the candidate with the model it would replace, on the evidence there is."""
        program = self._evaluation(self._program)
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

    def validation_loss(self, number: int) -> float | None:
        """What the gateway's own samples say of the model that round `number` left: lower is better; None without them."""
        record, program = self._journal.round(number), self._evaluation(self._program)
        if record is None or program.score is None or record.validation_after is None:
            return None
        kept = record.validation_after if record.model == record.candidate else record.validation_before
        if kept is None:
            return None
        return kept if program.score.better == "lower" else 1.0 - kept

    def merger(self, number: int) -> Merger:
        """The merge rule of a round."""
        return merger_for(plan_of(self._job, self._bundle, self.assigner, number))

    def program(self, number: int, phase: str, device: str) -> Program:
        """What a device runs in a phase of a round."""
        if phase != "train":
            return self._evaluation(self._bundle.program(self.assigner.judges(number, device)))
        return self._bundle.program(self._trained(number, device))

    def _trained(self, number: int, device: str) -> str:
        return self._journal.assigned(number, device) or self.assigner.usual(number, device)

    def start_of(self, number: int, model: str, program: Program) -> str:
        """The digest of what `program` starts from under `model`; stored as a blob. Raises `StorageError`."""
        key = (model, program.id)
        if key not in self._starts:
            tensors = self._model(model)
            cut = self.merger(number).cut(tensors, program)
            same = cut.keys() == tensors.keys()
            self._starts[key] = model if same else self._blobs.put(pack(cut))
        return self._starts[key]

    def _server_step(
        self,
        number: int,
        model: str,
        start: Mapping[str, np.ndarray[Any, Any]],
        merged: Mapping[str, np.ndarray[Any, Any]],
    ) -> tuple[dict[str, np.ndarray[Any, Any]], str]:
        """The step from `start`, with the moments of the merge that made `model`; the new ones are stored as a blob."""
        held = self.moments_of(number, model)
        moments = {} if held is None else unpack(self._blobs.read(held))[0]
        stepped, kept = server_step(self._job.merge.server, start, merged, moments)
        return stepped, self._blobs.put(pack(kept))

    def moments_of(self, number: int, model: str) -> str | None:
        """The digest of the server optimizer's moments that belong to `model`, which a round before `number` made."""
        for earlier in range(number - 1, 0, -1):
            record = self._journal.round(earlier)
            if record is not None and record.candidate == model and record.merge.get("moments"):
                return str(record.merge["moments"])
        return None

    def prune(self, keep: Collection[str], number: int) -> None:
        """Delete all blobs but `keep` and the moments that round `number` or the one after it may need."""
        steps = self._job.merge.server.optimizer != "none"
        moments = {self.moments_of(number + 1, model) for model in keep} if steps else set()
        kept = {*keep, *(digest for digest in moments if digest)}
        self._blobs.prune(kept)
        self._starts = {key: digest for key, digest in self._starts.items() if digest in kept}

    def _contributions(
        self, rows: Sequence[LedgerRow], merger: Merger, number: int, model: str
    ) -> Iterator[Contribution]:
        """The updates in order.

        What a late one changed is discounted by (1 + staleness)^-1/2 (FedBuff, section 5) and, for rules that keep the
        basis, put on the present model; the others take late updates as changes themselves.
        """
        table = self._bundle.tensors
        for row in rows:
            program, start = self.program(row.round, row.phase, row.device), self._model(row.start)
            body = self._journal.body(row.device, row.upload)
            values = decode_update(body, program, table, start, row.start)
            current = self.start_of(number, model, program)
            staleness = 0 if current == row.start else number - row.round
            found = self._contribution(row, start, values, staleness)
            if staleness and not merger.refactorises:
                found = _put_on(found, self._model(current))
            yield found

    def _contribution(
        self,
        row: LedgerRow | OpenUpload,
        start: Mapping[str, np.ndarray[Any, Any]],
        tensors: Mapping[str, np.ndarray[Any, Any]],
        staleness: int,
    ) -> Contribution:
        return Contribution(
            row.device,
            row.seq,
            row.num_examples,
            start,
            tensors,
            self._trained(row.round, row.device),
            row.start,
            staleness,
            (1 + staleness) ** -0.5,
        )

    def _evaluation(self, program: Program) -> Program:
        return program if program.evaluate is None else self._bundle.program(program.evaluate)

    def _model(self, digest: str) -> dict[str, np.ndarray[Any, Any]]:
        if digest not in self._models:
            self._models[digest] = unpack(self._blobs.read(digest))[0]
            while len(self._models) > _MODELS_KEPT:
                self._models.popitem(last=False)
        self._models.move_to_end(digest)
        return self._models[digest]

    def _norm_bound(self, number: int, start: Mapping[str, np.ndarray[Any, Any]]) -> float | None:
        if number not in self._bounds:
            fixed = self._job.limits.norm
            bound = fixed or norm_bound(self._journal.last_norms(number), start)
            self._bounds = {number: bound}
        return self._bounds[number]


def _put_on(late: Contribution, current: Mapping[str, np.ndarray[Any, Any]]) -> Contribution:
    """The discounted change of a late update, as if it had started from the present model."""
    factor = np.float32(late.discount)
    moved = {name: current[name] + factor * (value - late.start[name]) for name, value in late.tensors.items()}
    return replace(late, tensors=moved, start=current, discount=1.0)


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
