"""The rules by which updates become one model.

A rule folds contributions into a state, one after another in sorted (device, seq) order, and `finish` turns the state
into the model. There are two kinds of state, and a rule's `needs` says which it takes:

* `Sums` (aggregator/merge/sums.py): weighted sums. An update is forgotten once it is added; states of several gateways
  combine.
* `Updates` (aggregator/merge/updates.py): all updates, on disk when they are large. They combine too, as a union.

The order is fixed and every sum runs in it, so the same updates give the same bytes whatever order they came in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Protocol, Self

from aggregator.merge.settings import MergeSettings
from edge_sdk.bundle import Program, TensorEntry
from edge_sdk.errors import EdgewiseError
from edge_sdk.tensors import Array, Tensors

__all__ = [
    "ANY_STALENESS",
    "GROUP",
    "Contribution",
    "MergeError",
    "MergeResult",
    "Merger",
    "Plan",
    "Rule",
    "State",
    "check_next",
    "cut_by_name",
    "merge",
    "merger_for",
    "rule_named",
]

GROUP = "edgewise.mergers"
ANY_STALENESS = 1_000_000


class MergeError(EdgewiseError):
    """The rule cannot merge these updates."""


@dataclass(frozen=True)
class Contribution:
    """One accepted update: absolute tensors by table name, and those it started from.

    `program` is what it trained, `start_digest` names `start`. `staleness` counts the rounds since its start was current;
    `discount`, from above 0 to 1, is what that costs its weight.
    """

    device: str
    seq: int
    num_examples: int
    start: Tensors
    tensors: Tensors
    program: str = ""
    start_digest: str = ""
    staleness: int = 0
    discount: float = 1.0

    @property
    def key(self) -> tuple[str, int]:
        """What the order of merging goes by."""
        return (self.device, self.seq)


@dataclass(frozen=True)
class MergeResult:
    """The merged tensors (float32, by table name) and what the rule reports about them (plain JSON values)."""

    tensors: dict[str, Array]
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """What a rule is made for: one round.

    `program` owns the model: its tensors and constants are what `finish` may change. `trained` are the programs that
    devices train in this round, by id, among them other ranks of `program` or other factors.
    """

    program: Program
    trained: Mapping[str, Program]
    table: Mapping[str, TensorEntry]
    settings: MergeSettings = field(default_factory=MergeSettings)
    seed: int = 0
    round: int = 1

    @classmethod
    def of(cls, program: Program, table: Mapping[str, TensorEntry], **more: Any) -> Plan:
        """The plan of a round in which every device trains `program`."""
        return cls(program, {program.id: program}, table, **more)


class State(Protocol):
    """What contributions are folded into; a monoid under `combine`."""

    def add(self, contribution: Contribution) -> None:
        """Fold one more in. Raises `MergeError` unless its (device, seq) lies above all that were added."""
        ...

    def combine(self, other: Self) -> Self:
        """The state of both. Raises `MergeError` where both hold the same update."""
        ...

    def close(self) -> None:
        """Let go of memory and files."""
        ...


class Merger(Protocol):
    """A rule for one round."""

    @property
    def refactorises(self) -> bool:
        """Whether it changes the basis of the tensors: residuals of an encoding and moments of an optimizer mean nothing then."""
        ...

    @property
    def needs(self) -> type[Any]:
        """The type of its state: `Sums`, or `Updates` where it needs all updates at once."""
        ...

    def check(self, contribution: Contribution) -> None:
        """Raises `MergeError` for an update that this rule cannot take, for instance one of an old basis."""
        ...

    def empty(self) -> Any:
        """The state before the first update."""
        ...

    def finish(self, state: Any, start: Tensors) -> MergeResult:
        """Turn the state into what the next round starts from. Raises `MergeError`."""
        ...

    def cut(self, model: Tensors, program: Program) -> dict[str, Array]:
        """What a device starts `program` from."""
        ...


class Rule(Protocol):
    """What an entry point of the group `edgewise.mergers` names. `uses`: the keys of `[merge]` that mean something to it."""

    @property
    def uses(self) -> frozenset[str]:
        """Keys below `merge`, for instance `robust.attackers`."""
        ...

    @property
    def max_staleness(self) -> int:
        """How many rounds late an update may be at most."""
        ...

    def create(self, plan: Plan) -> Merger:
        """The rule for one round. Raises `MergeError` if it does not fit the programs or the settings."""
        ...


def merge(merger: Merger, contributions: Iterable[Contribution], start: Tensors) -> MergeResult:
    """Fold contributions, which come in sorted (device, seq) order, and finish. Raises `MergeError`."""
    state = merger.empty()
    try:
        for contribution in contributions:
            state.add(contribution)
        return merger.finish(state, start)
    finally:
        state.close()


def rule_named(name: str | None, program: Program, table: Mapping[str, TensorEntry]) -> Rule:
    """The rule of that name. Raises `MergeError` listing the names that exist."""
    if name is None:
        name = "product_svd" if any(table[t].merge == "lora_a" for t in program.tensors) else "mean"
    known = {point.name: point for point in entry_points(group=GROUP)}
    if name not in known:
        raise MergeError(f"no merge rule is called {name!r}; there are {', '.join(sorted(known))}")
    rule: Rule = known[name].load()
    return rule


def merger_for(plan: Plan) -> Merger:
    """The rule that the settings name, for this round. Raises `MergeError`."""
    return rule_named(plan.settings.rule, plan.program, plan.table).create(plan)


def check_next(last: tuple[str, int] | None, contribution: Contribution) -> None:
    """What every state checks before it adds. Raises `MergeError`."""
    if contribution.num_examples < 1:
        raise MergeError(
            f"the update of {contribution.device!r} counts {contribution.num_examples} examples, at least 1"
        )
    if last is not None and contribution.key == last:
        raise MergeError(f"update {contribution.seq} of device {contribution.device!r} would be counted twice")
    if last is not None and contribution.key < last:
        raise MergeError(
            f"update {contribution.seq} of device {contribution.device!r} comes after one of {last[0]!r}: "
            "updates are folded in sorted order, so that equal updates give equal bytes"
        )


def cut_by_name(model: Tensors, program: Program, table: Mapping[str, TensorEntry]) -> dict[str, Array]:
    """The model's tensors that a program starts from or reads, unchanged."""
    return {name: model[name] for name in program.reads if table[name].kind != "a"}
