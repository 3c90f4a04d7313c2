"""The rules by which updates become one model.

A merge state is a monoid: `empty`, `add(contribution)`, `combine(other)`, and `finish`. Contributions are folded in
sorted (device, seq) order with float64 sums, so the same updates give the same bytes whatever order they came in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar, Protocol, Self

from edge_sdk.bundle import Program, TensorEntry
from edge_sdk.errors import EdgewiseError
from edge_sdk.tensors import Array, Tensors

__all__ = ["GROUP", "Contribution", "MergeError", "MergeResult", "Merger", "State", "empty", "merger_for"]

GROUP = "edgewise.mergers"


class MergeError(EdgewiseError):
    """The rule cannot merge these updates."""


@dataclass(frozen=True)
class Contribution:
    """One accepted update: absolute float32 tensors by table name, and those it started from."""

    device: str
    seq: int
    num_examples: int
    start: Tensors
    tensors: Tensors


@dataclass(frozen=True)
class MergeResult:
    """The merged tensors (float32, by table name) and what the rule reports about them (plain JSON values)."""

    tensors: dict[str, Array]
    report: Mapping[str, Any]


@dataclass(frozen=True)
class State:
    """Contributions by (device, seq), nothing truncated: what every rule needs, and a monoid under `combine`."""

    contributions: Mapping[tuple[str, int], Contribution]

    def add(self, contribution: Contribution) -> State:
        """The state with one more contribution. Raises `MergeError` for one that it holds already."""
        return self.combine(State({(contribution.device, contribution.seq): contribution}))

    def combine(self, other: State) -> State:
        """The union. Raises `MergeError` where both hold the same update."""
        twice = self.contributions.keys() & other.contributions.keys()
        if twice:
            device, seq = min(twice)
            raise MergeError(f"update {seq} of device {device!r} would be counted twice")
        return State({**self.contributions, **other.contributions})

    def in_order(self) -> list[Contribution]:
        """The contributions, sorted by (device, seq). Raises `MergeError` if there are none or no examples."""
        rows = [self.contributions[key] for key in sorted(self.contributions)]
        if not rows or any(row.num_examples < 1 for row in rows):
            raise MergeError("there is nothing to merge: every update must count at least one example")
        return rows


class Merger(Protocol):
    """A rule. `refactorises`: it changes the basis of the tensors, so residuals of an encoding must be cleared."""

    refactorises: ClassVar[bool]

    @classmethod
    def create(cls, program: Program, table: Mapping[str, TensorEntry], settings: Any, seed: int, number: int) -> Self:
        """The rule for one round. Raises `MergeError` if it does not fit the tensor table."""
        ...

    def finish(self, state: State, start: Tensors) -> MergeResult:
        """Fold the state into what the next round starts from. Raises `MergeError`."""
        ...


def merger_for(
    name: str, program: Program, table: Mapping[str, TensorEntry], settings: Any, seed: int, number: int
) -> Merger:
    """The rule of that name for round `number`. Raises `MergeError` listing the names that exist."""
    known = {point.name: point for point in entry_points(group=GROUP)}
    if name not in known:
        raise MergeError(f"no merge rule is called {name!r}; there are {', '.join(sorted(known))}")
    merger: Merger = known[name].load().create(program, table, settings, seed, number)
    return merger


def empty() -> State:
    """The state before the first update."""
    return State({})
