"""PTQ or QAT for each device, as an assigner: what job, bundle and journal know becomes events of `precision.decide`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aggregator.assign import Answer, AssignError, Question, Worked
from aggregator.assign.precision import (
    Event,
    Joined,
    Left,
    Opened,
    State,
    Trained,
    Validated,
    decide,
    state_from_json,
    state_to_json,
)
from aggregator.assign.precision_coarse import RATIO_LIMITS, Choice
from aggregator.assign.settings import PrecisionSettings
from edge_sdk.bundle import Program

if TYPE_CHECKING:
    from aggregator.job import Job
    from edge_sdk.bundle import Bundle

STEP_MS: Final = "step_ms"  # of an update's metrics
_BITS = re.compile(r"[a-z]+([2-8])")


@dataclass(frozen=True)
class PrecisionRule:
    """The rule as an entry point."""

    uses: tuple[str, ...] = ("precision.",)

    def create(self, job: Job, bundle: Bundle) -> PrecisionAssigner:
        """Raises `AssignError` unless both programs are there and train the same tensors, at some number of bits."""
        settings, where = job.assign.precision, "assign.precision.programs"
        if set(settings.programs) != set(Choice):
            found = ", ".join(sorted(settings.programs)) or "nothing"
            raise AssignError(f"{where} names the programs {' and '.join(Choice)}, found {found}")
        ptq, qat = (bundle.program(settings.programs[choice]) for choice in Choice)
        if job.program not in (ptq.id, qat.id):
            raise AssignError(f"program = {job.program!r} must be one of {where}: {ptq.id} or {qat.id}")
        if ptq.precision == qat.precision or set(ptq.reads) != set(qat.reads) or ptq.scope != qat.scope:
            raise AssignError(
                f"{where}: {ptq.id} and {qat.id} must train the same tensors in the same scope, at different precisions"
            )
        drop = settings.drop or float(ptq.cost.get("drop", 0.0))
        if not drop:
            raise AssignError(
                f"assign.precision.drop: nobody has measured what {ptq.id} costs in accuracy: evaluate a trained model "
                "in float and quantized, and give the difference (0.05: five points)"
            )
        notes: tuple[str, ...] = ()
        if settings.fine.every and job.gate.validation is None:
            notes = (
                "assign.precision.fine is off: it learns from the gateway's own samples, and there is no gate.validation",
            )
        return PrecisionAssigner(
            settings, job.program, {Choice.PTQ: ptq.id, Choice.QAT: qat.id}, job.task.steps, job.task.epochs,
            job.task.batch_size, _bits(ptq), _ratio(ptq, qat), drop, notes,
        )  # fmt: skip


@dataclass(frozen=True)
class PrecisionAssigner:
    """`program` is one of `ids`: its `evaluate` program measures every model. `ratio`, `drop`: first guesses."""

    settings: PrecisionSettings
    program: str
    ids: Mapping[Choice, str]
    steps: int
    epochs: int
    batch_size: int
    bits: int
    ratio: float
    drop: float
    notes: tuple[str, ...] = ()

    @property
    def programs(self) -> tuple[str, ...]:
        """The model's first."""
        return tuple(dict.fromkeys((self.program, *self.ids.values())))

    @property
    def period(self) -> int:
        """Every round may train both."""
        return 1

    def trained_in(self, number: int) -> tuple[str, ...]:  # noqa: ARG002
        """Both."""
        return self.programs

    def usual(self, number: int, device: str) -> str:  # noqa: ARG002
        """PTQ, which every device can do."""
        return self.ids[Choice.PTQ]

    def judges(self, number: int, device: str) -> str:  # noqa: ARG002
        """Always the same, so that what a device does in a round does not change how it measures."""
        return self.program

    def answer(self, state: Mapping[str, Any] | None, question: Question) -> Answer:
        """The allocation of the round."""
        held = State(self.settings) if state is None else state_from_json(self.settings, state)
        present = sorted(question.present.union(question.devices))
        events: list[Event] = [Joined(device, self.bits, self.ratio, self.drop) for device in present]
        events += [Left(device) for device in sorted(held.devices) if device not in present]
        events += [trained for work in question.worked if (trained := self._trained(work)) is not None]
        if question.loss is not None and question.number > held.round:
            events.append(Validated(question.loss))
        held, choices, reasons = decide(held, [*events, Opened(question.number, question.rounds)])
        return Answer(
            {device: self.ids[choices[device]] for device in question.devices},
            {device: reasons[device] for device in question.devices},
            state_to_json(held),
        )

    def _trained(self, work: Worked) -> Trained | None:
        choice = next((choice for choice, program in self.ids.items() if program == work.program), None)
        if choice is None:
            return None
        steps = self.steps or self.epochs * max(1, math.ceil(work.num_examples / self.batch_size))
        ms = work.metrics.get(STEP_MS, math.nan)
        return Trained(work.device, choice, ms, steps, work.seconds, work.num_examples)


def _bits(program: Program) -> int:
    found = _BITS.fullmatch(program.precision)
    if found is None:
        raise AssignError(
            f"assign.precision.programs: {program.id} has precision {program.precision!r}, expected ptq<bits>"
        )
    return int(found[1])


def _ratio(ptq: Program, qat: Program) -> float:
    """What the exporter counted; 1 where it did not."""
    flops = [float(program.cost.get("step_flops", 0.0)) for program in (ptq, qat)]
    return min(max(flops[1] / flops[0], 1.0), RATIO_LIMITS[1]) if all(flops) else 1.0


PRECISION: Final = PrecisionRule()
