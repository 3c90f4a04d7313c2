"""Which rank a device gets: the largest that its profile says it can hold, and train before the round's deadline.

The ranks are the programs of the bundle that differ from the job's `program` in rank alone. What a program takes is what the
exporter counted: state, intermediate values of a batch, graphs and weights, beside the runtime itself. How long its steps
take is the profile's measurement of it, or of another rank in proportion to the operations. A profile measures nothing on its
own: where it has no times, memory alone decides, and the job says so before its first round.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aggregator.assign import AssignError
from aggregator.assign.fixed import FixedAssigner
from devices.profile import DeviceProfile, load_profile
from edge_sdk.bundle import WEIGHTS

if TYPE_CHECKING:
    from aggregator.job import Job
    from edge_sdk.bundle import Bundle, Program

_MB: Final = 1e6


@dataclass(frozen=True)
class Demand:
    """What one round of a program takes: bytes of memory beside the runtime, steps, and the seconds there are."""

    program: str
    rank: int
    memory: float
    flops: float  # of one step
    steps: int  # 0: not known beforehand
    seconds: float


@dataclass(frozen=True)
class RankRule:
    """The rule as an entry point."""

    uses: tuple[str, ...] = ("rank.",)

    def create(self, job: Job, bundle: Bundle) -> FixedAssigner:
        """Raises `AssignError` where there is nothing to choose from, or a device can do none of it; `ProfileError`."""
        demands = _demands(job, bundle)
        if len(demands) < 2:
            raise AssignError(
                f"assign.rank: {job.program} is the only rank of its kind in the bundle: export others beside it with "
                "named_by_rank = true, and let `program` name the largest"
            )
        own, notes = {}, []
        for device, name in sorted(job.assign.rank.profiles.items()):
            profile = load_profile(job.file.parent / name if name.endswith(".toml") else Path(name))
            try:
                own[device], note = choose(profile, demands)
            except AssignError as error:
                raise AssignError(f"assign.rank.profiles.{device}: {error}") from error
            if note:
                notes.append(f"{device}: {note}")
        return FixedAssigner(job.program, own, (), tuple(notes))


def choose(profile: DeviceProfile, demands: list[Demand]) -> tuple[str, str]:
    """The program of the largest rank that fits, and what could not be judged ("": nothing). `demands` are of falling rank.

    Raises `AssignError` where not even the smallest fits.
    """
    there = _MB * (profile.numbers["ram_mb"].value - profile.numbers["runtime_overhead_mb"].value)
    note, reason = "", ""
    for demand in demands:
        seconds = _seconds(profile, demand, demands)
        if demand.memory > there:
            reason = f"{demand.program} takes {demand.memory / _MB:.1f} MB and {there / _MB:.1f} MB are there"
        elif seconds is not None and seconds > demand.seconds:
            reason = f"{demand.program} takes {seconds:.0f} s of training and {demand.seconds:.0f} s are there"
        else:
            if seconds is None:
                note = f"nobody measured how long {profile.name} trains, so {demand.program} was chosen by memory alone"
            return demand.program, note
    raise AssignError(f"{profile.name} can do no rank: {reason}")


def _seconds(profile: DeviceProfile, demand: Demand, demands: list[Demand]) -> float | None:
    """The predicted time of the task's steps; None where the profile measured no rank of this network, or steps are unknown."""
    times = {entry.program: entry.step_ms.value / 1e3 for entry in profile.programs}
    measured = [other for other in demands if other.program in times]
    if not demand.steps or not measured:
        return None
    if demand.program in times:
        return demand.steps * times[demand.program]
    nearest = min(measured, key=lambda other: abs(other.rank - demand.rank))
    growth = demand.flops / nearest.flops if nearest.flops else 1.0
    return demand.steps * times[nearest.program] * growth


def _demands(job: Job, bundle: Bundle) -> list[Demand]:
    """The programs to choose from, the largest rank first."""
    largest = bundle.program(job.program)
    same = [
        program
        for program in bundle.programs.values()
        if (program.scope, program.precision, program.factors) == (largest.scope, largest.precision, largest.factors)
        and 0 < program.rank <= largest.rank
        and not program.accumulates
    ]
    seconds = job.round.deadline_seconds * (1 - job.round.evaluate_share)
    return [
        Demand(
            program.id,
            program.rank,
            _memory(program, bundle, job.task.batch_size),
            float(program.cost.get("step_flops", 0.0)),
            job.task.steps,
            seconds,
        )
        for program in sorted(same, key=lambda held: -held.rank)
    ]


def _memory(program: Program, bundle: Bundle, batch: int) -> float:
    values = float(program.cost.get("step_bytes_per_sample", 0.0)) * batch
    graphs = sum(bundle.files[name] for name in program.graphs)
    return float(program.cost.get("state_bytes", program.state_bytes)) + values + graphs + bundle.files.get(WEIGHTS, 0)


RANK: Final = RankRule()
