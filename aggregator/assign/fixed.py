"""What a device trains as the job file says: `program`, its own one (`assign.programs`), or the next of `assign.cycle`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aggregator.assign import Answer, AssignError, Question

if TYPE_CHECKING:
    from aggregator.job import Job
    from edge_sdk.bundle import Bundle


@dataclass(frozen=True)
class FixedRule:
    """The rule as an entry point."""

    uses: tuple[str, ...] = ("programs", "cycle")

    def create(self, job: Job, bundle: Bundle) -> FixedAssigner:  # noqa: ARG002
        """Raises `AssignError` where the job says both."""
        if job.assign.cycle and job.assign.programs:
            raise AssignError("assign.cycle and assign.programs exclude each other: give one of them")
        return FixedAssigner(job.program, job.assign.programs, tuple(job.assign.cycle))


@dataclass(frozen=True)
class FixedAssigner:
    """`own`: device -> its program; `cycle`: one a round for all devices."""

    program: str
    own: Mapping[str, str]
    cycle: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def programs(self) -> tuple[str, ...]:
        """`program` first."""
        return tuple(dict.fromkeys((self.program, *self.own.values(), *self.cycle)))

    @property
    def period(self) -> int:
        """The length of the cycle."""
        return max(1, len(self.cycle))

    def trained_in(self, number: int) -> tuple[str, ...]:
        """Round 1 is the first that trains."""
        if self.cycle:
            return (self.usual(number, ""),)
        return tuple(dict.fromkeys((self.program, *sorted(self.own.values()))))

    def usual(self, number: int, device: str) -> str:
        """What it always trains."""
        if self.cycle:
            return self.cycle[(max(number, 1) - 1) % len(self.cycle)]
        return self.own.get(device, self.program)

    def judges(self, number: int, device: str) -> str:
        """What it trains."""
        return self.usual(number, device)

    def answer(self, state: Mapping[str, Any] | None, question: Question) -> Answer:  # noqa: ARG002
        """Always the same, so there is no reason to give."""
        return Answer({device: self.usual(question.number, device) for device in question.devices}, {})


FIXED: Final = FixedRule()
