"""Which program a device trains in a round: `program`, its own one (`assign.programs`), or the next of `assign.cycle`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aggregator.merge import Plan
from edge_sdk.bundle import Bundle

if TYPE_CHECKING:
    from aggregator.job import Job


def program_of(job: Job, number: int, device: str) -> str:
    """The id of the program that `device` trains in round `number` (1 is the first that trains)."""
    if job.assign.cycle:
        return job.assign.cycle[(max(number, 1) - 1) % len(job.assign.cycle)]
    return job.assign.programs.get(device, job.program)


def trained_in(job: Job, number: int) -> tuple[str, ...]:
    """The ids of all programs that may be trained in a round, `program` first."""
    if job.assign.cycle:
        return (job.assign.cycle[(max(number, 1) - 1) % len(job.assign.cycle)],)
    return tuple(dict.fromkeys((job.program, *sorted(job.assign.programs.values()))))


def plan_of(job: Job, bundle: Bundle, number: int) -> Plan:
    """What the merge rule of a round is made for. Raises `BundleError` for a program that the bundle lacks."""
    trained = {program_id: bundle.program(program_id) for program_id in trained_in(job, number)}
    return Plan(bundle.program(job.program), trained, bundle.tensors, job.merge, job.seed, number)
