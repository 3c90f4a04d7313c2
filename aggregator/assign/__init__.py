"""What each device is told to do in a round: which program it trains, and why.

An assigner is looked up by the name that a job file gives in `assign.rule` (entry points of the group `edgewise.assigners`);
no other code knows these names. It is a pure function of its own state, which the journal keeps, and of what became known
since its last answer. It picks program ids and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol

from edge_sdk.errors import EdgewiseError

if TYPE_CHECKING:
    from aggregator.job import Job
    from edge_sdk.bundle import Bundle

__all__ = ["GROUP", "Answer", "AssignError", "Assigner", "Question", "Rule", "Worked", "assigner_for", "rule_named"]

GROUP = "edgewise.assigners"


class AssignError(EdgewiseError):
    """The assigner cannot do with this job or bundle what it is for."""


@dataclass(frozen=True)
class Worked:
    """An accepted update. `program` is what it trained, `seconds` from the task to the acceptance; `metrics` are the device's own."""

    device: str
    program: str
    seconds: float
    num_examples: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Question:
    """Round `number` of `rounds` opens, or a device comes late to it: what are `devices` to train?

    `present`: every device that is online. `worked`: what was accepted since the last answer. `loss`: of the present model on
    the gateway's validation samples, None without them.
    """

    number: int
    rounds: int
    devices: Sequence[str]
    present: frozenset[str]
    worked: Sequence[Worked] = ()
    loss: float | None = None


@dataclass(frozen=True)
class Answer:
    """device -> program id, device -> why ("": nothing to say), and the state to keep (plain JSON values)."""

    programs: Mapping[str, str]
    reasons: Mapping[str, str]
    state: Mapping[str, Any] | None = None


class Assigner(Protocol):
    """What is assigned in one job."""

    @property
    def programs(self) -> tuple[str, ...]:
        """Every program id that may be assigned."""
        ...

    @property
    def period(self) -> int:
        """After how many rounds `trained_in` repeats."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What the operator should know before the first round."""
        ...

    def trained_in(self, number: int) -> tuple[str, ...]:
        """The ids of all programs that may be trained in a round."""
        ...

    def usual(self, number: int, device: str) -> str:
        """The program of a device of which the journal says nothing."""
        ...

    def judges(self, number: int, device: str) -> str:
        """The program whose `evaluate` program a device runs to measure a model."""
        ...

    def answer(self, state: Mapping[str, Any] | None, question: Question) -> Answer:
        """The programs of `question.devices`; `state` is that of the last answer, None before the first."""
        ...


class Rule(Protocol):
    """What an entry point names. `uses`: the keys below `assign` that mean something to it, as prefixes."""

    @property
    def uses(self) -> tuple[str, ...]:
        """For instance `precision.`."""
        ...

    def create(self, job: Job, bundle: Bundle) -> Assigner:
        """The assigner of a job. Raises `AssignError`, and `BundleError` for a program that the bundle lacks."""
        ...


def rule_named(name: str) -> Rule:
    """The rule of that name. Raises `AssignError` listing the names that exist."""
    known = {point.name: point for point in entry_points(group=GROUP)}
    if name not in known:
        raise AssignError(f"no assigner is called {name!r}; there are {', '.join(sorted(known))}")
    rule: Rule = known[name].load()
    return rule


def assigner_for(job: Job, bundle: Bundle) -> Assigner:
    """The assigner that the job names. Raises `AssignError`."""
    return rule_named(job.assign.rule).create(job, bundle)
