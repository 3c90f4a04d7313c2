"""Every device gets the same work: the job's steps, batch size and learning rate, which may fall over the rounds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from aggregator.job import Job
from edge_sdk.bundle import Program
from edge_sdk.update import Encoding


@dataclass(frozen=True)
class Assignment:
    """What one device is to do; exactly one of `steps` and `epochs` is not 0."""

    steps: int
    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    encoding: Encoding
    hyper: Mapping[str, float] = field(default_factory=dict)


def assign(
    job: Job, program: Program, number: int, devices: Sequence[str], *, refactorises: bool
) -> dict[str, Assignment]:
    """Device -> its assignment in round `number` (1 is the first that trains).

    A program that only accumulates passes once over its samples and travels exactly. `refactorises`: the merge rule gives
    the tensors a new basis, so residuals of an encoding must not be carried over (methods/lora.md, section 8).
    """
    task = job.task
    if program.accumulates:
        return {
            device: Assignment(0, 1, program.batch_default, 0.0, seed_of(job.seed, number, device), Encoding())
            for device in devices
        }
    encoding = Encoding(
        task.encoding,
        "clear" if refactorises else "keep",
        task.density,
        task.compression,
        tuple(task.encodings_allowed),
    )
    rate = learning_rate(job, number)
    return {
        device: Assignment(
            task.steps, task.epochs, task.batch_size, rate, seed_of(job.seed, number, device), encoding, task.hyper
        )
        for device in devices
    }


def learning_rate(job: Job, number: int) -> float:
    """`linear` falls from the first round's rate to `final_fraction` of it in the last."""
    task = job.task
    if task.schedule != "linear" or job.rounds < 2:
        return task.learning_rate
    progress = (min(max(number, 1), job.rounds) - 1) / (job.rounds - 1)
    return task.learning_rate * (1.0 - (1.0 - task.final_fraction) * progress)


def seed_of(seed: int, number: int, device: str) -> int:
    """A device's seed in a round: 53 bits of a digest over the job's seed, the round and the id."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}/{device}".encode()).digest()[:8], "big") >> 11
