"""Runs one task: samples -> batches -> steps -> the body of an update.

The step is the atom. Between two steps the caller's `before_step` may wait (for predictions, heat, a pause) or raise
`TaskCancelled`; nothing else interrupts. The same task over the same samples gives the same bytes.
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

    `num_examples`: the samples that the device trained or counted with, each once. `seconds`: spent in steps.
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
    has; a step that would go on for longer is ended and left out. `on_step` gets each result, the number of the step and how many there will be. Raises `TaskError` when the
    device cannot do the task and `TaskCancelled` from `before_step`.
    """
    program = bundle.program(spec.program)
    ids = _eligible(bundle, program, samples)
    batches, total = _batches(ids, program, spec)
    hyper = {**spec.hyper, "lr": spec.learning_rate} if "lr" in program.hyper else dict(spec.hyper)
    stepper = Stepper(bundle, program, start, profile, seed=spec.seed)
    results: list[StepResult] = []
    spent = 0.0
    try:
        for batch_ids in batches:
            before_step()
            began = time.perf_counter()
            left = None if seconds is None or program.accumulates else seconds - spent
            # Most steps are far from the limit, and a watch for each would cost more than it saves.
            watched = left is not None and left < _MARGIN * max((result.seconds for result in results), default=left)
            try:
                result = stepper.step(
                    samples.read(batch_ids), hyper, ids=batch_ids, seconds=left if watched or not results else None
                )
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
        trained = stepper.tensors()
    finally:
        stepper.close()
    body, residuals = encode_update(
        program, bundle.tensors, start, spec.start_digest, trained, spec.encoding, feedback, spec.seed
    )
    return Outcome(body, len(ids), _metrics(program, results, trained), residuals, len(results), spent)


def hottest_zone(zones: Path = THERMAL_ZONES) -> float | None:
    """The highest temperature in degrees Celsius that Linux reports, None where it reports none."""
    readings = []
    for file in sorted(zones.glob("thermal_zone*/temp")):
        try:
            readings.append(int(file.read_text()) / 1000)
        except (OSError, ValueError):
            continue  # a zone whose sensor is switched off answers with an error
    return max(readings, default=None)


def _eligible(bundle: Bundle, program: Program, samples: SampleStore) -> Ids:
    held_out = program.samples == "held_out"
    ids = samples.held_out_ids(bundle.held_out) if held_out else samples.train_ids(bundle.held_out)
    needed = program.batch_minimum
    if len(ids) < needed:
        kind = "held-out" if held_out else "training"
        raise TaskError(f"{len(ids)} {kind} samples, program {program.id!r} needs at least {needed}: record more")
    return ids


def _batches(ids: Ids, program: Program, spec: TaskSpec) -> tuple[Iterator[Ids], int]:
    """Batches of sample ids, and how many there are."""
    size = min(spec.batch_size, len(ids))
    draws = Draws(spec.seed, "order")
    if program.accumulates:  # every sample once; the order does not matter
        passes = max(1, spec.epochs)
        return (part for _ in range(passes) for part in _split(ids, size, program)), passes * -(-len(ids) // size)
    if spec.steps:
        return _endless(ids, size, spec.steps, draws), spec.steps
    count = len(_split(ids, size, program))
    return (
        part for _ in range(spec.epochs) for part in _split(draws.permutation(ids), size, program)
    ), spec.epochs * count


def _split(ids: Ids, size: int, program: Program) -> list[Ids]:
    parts = [ids[first : first + size] for first in range(0, len(ids), size)]
    whole = program.partial_batch == "drop" or len(parts[-1]) < program.batch_minimum
    return parts[:-1] if whole and len(parts) > 1 and len(parts[-1]) < size else parts


def _endless(ids: Ids, size: int, steps: int, draws: Draws) -> Iterator[Ids]:
    """`steps` batches from one shuffled pass after another, without a short batch in between."""
    order = draws.permutation(ids)
    for _ in range(steps):
        if len(order) < size:
            order = np.concatenate([order, draws.permutation(ids)])
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
        "loss_first": float(np.mean(losses[:tenth])),
        "loss_last": float(np.mean(losses[-tenth:])),
    }
