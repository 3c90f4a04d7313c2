"""Runs one task: samples -> batches -> steps -> the body of an update.

The step is the atom. Between two steps the caller's `before_step` may wait (for predictions, heat, a pause) or raise
`TaskCancelled`; nothing else interrupts. The same task over the same samples gives the same bytes.

The app goes on recording meanwhile, and a full store lets its oldest samples go: a run leaves out those that are gone and
goes on with the others. What is recorded after a run has begun takes no part in it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edge_sdk.bundle import Bundle, Program
from edge_sdk.draws import Draws
from edge_sdk.errors import TaskError
from edge_sdk.runtime import RuntimeProfile, StepInterrupted, Stepper, StepResult
from edge_sdk.samples import Ids, SampleStore
from edge_sdk.tensors import Array, Tensors
from edge_sdk.update import Encoding, encode_update

log = logging.getLogger(__name__)

_MARGIN = 4.0  # longest steps that must be left of the time, or the step is watched
THERMAL_ZONES = Path("/sys/class/thermal")


class TaskCancelled(TaskError):
    """The task was withdrawn, replaced, or its deadline passed."""


@dataclass(frozen=True)
class TaskSpec:
    """What a task asks for; exactly one of `steps` and `epochs` is not 0."""

    program: str
    start_digest: str
    steps: int
    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    hyper: Mapping[str, float] = field(default_factory=dict)
    encoding: Encoding = Encoding()


@dataclass(frozen=True)
class Outcome:
    """What a task yields: the body, what the offer says about it, and the residuals to keep for the next one.

    `num_examples`: the samples that the device trained or counted with, each once; those that the store let go before
    their turn are not among them. `seconds`: spent in steps.
    """

    body: bytes
    num_examples: int
    metrics: Mapping[str, float]
    feedback: Mapping[str, Array]
    steps: int
    seconds: float


def run_task(
    bundle: Bundle,
    spec: TaskSpec,
    start: Tensors,
    samples: SampleStore,
    *,
    profile: RuntimeProfile,
    feedback: Tensors,
    before_step: Callable[[], None] = lambda: None,
    on_step: Callable[[StepResult, int, int], None] = lambda result, done, of: None,
    seconds: float | None = None,
) -> Outcome:
    """Train, or count, as `spec` says.

    `start` holds the task's starting tensors by table name. After `seconds` of stepping the task ends early with what it
    has; a step that would go on for longer is ended and left out. `on_step` gets each result, the number of the step and how
    many there will be. Raises `TaskError` when the device cannot do the task, or no longer, and `TaskCancelled` from
    `before_step`.
    """
    program = bundle.program(spec.program)
    pool = _Pool(samples, _eligible(bundle, program, samples), program)
    batches, total = _batches(pool, program, spec)
    hyper = {**spec.hyper, "lr": spec.learning_rate} if "lr" in program.hyper else dict(spec.hyper)
    stepper = Stepper(bundle, program, start, profile, seed=spec.seed)
    results: list[StepResult] = []
    spent = 0.0
    try:
        while len(results) < total:
            before_step()  # it may wait for hours: a batch is drawn from what is stored after it
            ids = next(batches, None)
            if ids is None:
                break
            began = time.perf_counter()
            stored, batch = pool.read(ids)
            if batch is None:
                continue
            left = None if seconds is None or program.accumulates else seconds - spent
            # Most steps are far from the limit, and a watch for each would cost more than it saves.
            watched = left is not None and left < _MARGIN * max((result.seconds for result in results), default=left)
            try:
                result = stepper.step(batch, hyper, ids=stored, seconds=left if watched or not results else None)
            except StepInterrupted:
                if not results:
                    raise
                log.info("task of %s ends within step %d: %s s are used up", program.id, len(results) + 1, seconds)
                break
            results.append(result)
            spent += time.perf_counter() - began
            on_step(results[-1], len(results), total)
            if seconds is not None and spent >= seconds and len(results) < total and not program.accumulates:
                log.info(
                    "task of %s ends after %d of %d steps: %.0f s are used up",
                    program.id,
                    len(results),
                    total,
                    spent,
                )
                break
        if not results:
            raise TaskError(
                f"no batch of program {program.id!r} was still stored at its turn: raise limits.sample_bytes"
            )
        trained = stepper.tensors()
    finally:
        stepper.close()
    body, residuals = encode_update(
        program, bundle.tensors, start, spec.start_digest, trained, spec.encoding, feedback, spec.seed
    )
    return Outcome(body, pool.num_examples, _metrics(program, results, trained), residuals, len(results), spent)


def hottest_zone(zones: Path = THERMAL_ZONES) -> float | None:
    """The highest temperature in degrees Celsius that Linux reports, None where it reports none."""
    readings = []
    for file in sorted(zones.glob("thermal_zone*/temp")):
        try:
            readings.append(int(file.read_text()) / 1000)
        except (OSError, ValueError):
            continue  # a zone whose sensor is switched off answers with an error
    return max(readings, default=None)


class _Pool:
    """The samples of one run: `ids` are those still stored."""

    def __init__(self, samples: SampleStore, ids: Ids, program: Program) -> None:
        self._samples, self._program = samples, program
        self._used: set[int] = set()
        self.ids = ids

    @property
    def num_examples(self) -> int:
        """How many samples were there for their turn."""
        return len(self._used.union(self.ids.tolist()))

    def stored(self, ids: Ids) -> Ids:
        """Those of these ids that are still stored. Raises `TaskError` if too few are for another step."""
        oldest = self._samples.oldest()
        self.ids = self.ids[self.ids >= oldest]
        if len(self.ids) < self._program.batch_minimum:
            raise _too_few(
                self._program, len(self.ids), "are still stored", "record slower, or raise limits.sample_bytes"
            )
        return ids[ids >= oldest]

    def read(self, ids: Ids) -> tuple[Ids, dict[str, Array] | None]:
        """Those that are still stored, and their batch: None if too few are for a step."""
        stored, batch = self._samples.read_stored(ids)
        if len(stored) < len(ids):  # some went since the batch was drawn
            self.ids = self.ids[~np.isin(self.ids, np.setdiff1d(ids, stored))]
        if len(stored) < self._program.batch_minimum:
            return stored, None
        self._used.update(stored.tolist())
        return stored, batch


def _eligible(bundle: Bundle, program: Program, samples: SampleStore) -> Ids:
    held_out = program.samples == "held_out"
    ids = samples.held_out_ids(bundle.held_out) if held_out else samples.train_ids(bundle.held_out)
    if len(ids) < program.batch_minimum:
        raise _too_few(program, len(ids), "", "record more")
    return ids


def _too_few(program: Program, count: int, state: str, remedy: str) -> TaskError:
    kind = "held-out" if program.samples == "held_out" else "training"
    found = f"{count} {kind} samples {state}".rstrip()
    return TaskError(f"{found}, at least {program.batch_minimum} needed: {remedy} (program {program.id!r})")


def _batches(pool: _Pool, program: Program, spec: TaskSpec) -> tuple[Iterator[Ids], int]:
    """Batches of sample ids, and how many are to be used."""
    size = min(spec.batch_size, len(pool.ids))
    draws = Draws(spec.seed, "order")
    if program.accumulates:  # every sample once; the order does not matter
        passes = max(1, spec.epochs)
        whole = (pool.ids for _ in range(passes))
        return _passes(pool, whole, size, program), passes * -(-len(pool.ids) // size)
    if spec.steps:
        return _endless(pool, size, draws), spec.steps
    shuffled = (draws.permutation(pool.ids) for _ in range(spec.epochs))
    return _passes(pool, shuffled, size, program), spec.epochs * len(_split(pool.ids, size, program))


def _passes(pool: _Pool, orders: Iterator[Ids], size: int, program: Program) -> Iterator[Ids]:
    """One pass after another over what is stored at its beginning, less what goes meanwhile."""
    for order in orders:
        for part in _split(order, size, program):
            left = pool.stored(part)
            if len(left) >= program.batch_minimum:
                yield left


def _split(ids: Ids, size: int, program: Program) -> list[Ids]:
    parts = [ids[first : first + size] for first in range(0, len(ids), size)]
    whole = program.partial_batch == "drop" or len(parts[-1]) < program.batch_minimum
    return parts[:-1] if whole and len(parts) > 1 and len(parts[-1]) < size else parts


def _endless(pool: _Pool, size: int, draws: Draws) -> Iterator[Ids]:
    """Batches from one shuffled pass after another, without a short batch in between."""
    order = draws.permutation(pool.ids)
    while True:
        order = pool.stored(order)
        if len(order) < size:
            order = np.concatenate([order, draws.permutation(pool.ids)])
        yield order[:size]
        order = order[size:]


def _metrics(program: Program, results: list[StepResult], trained: Tensors) -> dict[str, float]:
    if program.score is not None:
        count = float(np.sum(trained[program.score.count]))
        return {"score": float(np.sum(trained[program.score.sum])) / count} if count else {}
    if program.accumulates:
        return {}
    tenth = max(1, len(results) // 10)
    losses = [result.loss for result in results]
    means = {
        name: float(np.mean([result.metrics[name] for result in results[-tenth:]])) for name in results[-1].metrics
    }
    return {
        **means,
        "step_ms": 1000 * float(np.median([result.seconds for result in results])),
        "loss_first": float(np.mean(losses[:tenth])),
        "loss_last": float(np.mean(losses[-tenth:])),
    }
