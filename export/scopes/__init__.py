"""Scopes: which tensors of a forward graph train. Looked up by name, entry-point group `edgewise.scopes`.

A scope turns constants of the graph into inputs `p.<t>`, or adds such inputs, and says how the model's own tensors follow
from them, so that the oracle can be asked about the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol, Self

import onnx_ir as ir

from edge_sdk.tensors import Array
from export.errors import SpecError

__all__ = ["GROUP", "Applied", "Scope", "Trainable", "scope_named"]

GROUP = "edgewise.scopes"

# (values of the trained tensors, frozen tensors of the model) -> those of the model's tensors that follow from them.
# Plain arithmetic, so that NumPy arrays and torch tensors may go through it.
Effective = Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Trainable:
    """One tensor that trains, or is given with the start: table name, value in a new job (float32), and how it merges.

    `kind` is the class of its graph name: `p`, or `c` for a constant of the round.
    """

    name: str
    value: Array
    merge: str = "mean"
    layer: str | None = None
    scale: float | None = None
    rank: int | None = None
    layer_shape: tuple[int, int] | None = None
    kind: str = "p"

    @property
    def graph_name(self) -> str:
        """The name of the graph input that holds it."""
        return f"{self.kind}.{self.name}"


@dataclass(frozen=True)
class Applied:
    """What a scope made of a graph: the trainables, in the order of the graph, and what the model's tensors become.

    `constants` are further inputs that come with the start and do not train.
    """

    trainables: tuple[Trainable, ...]
    effective: Effective
    constants: tuple[Trainable, ...] = ()


class Scope(Protocol):
    """One way to choose what trains. `rank` and `factors` go into the program (0 and "" where they mean nothing)."""

    rank: int
    factors: str

    @classmethod
    def create(cls, options: Mapping[str, Any]) -> Self:
        """From the options of an export specification. Raises `SpecError` naming the option."""
        ...

    @property
    def label(self) -> str:
        """What distinguishes its programs' ids beside the scope's name, for instance `r4`; may be empty."""
        ...

    def apply(self, model: ir.Model, parameters: Sequence[str], seed: int) -> Applied:
        """Change the graph in place. `parameters`: the model's constants that may train. Raises `ExportError`."""
        ...


def scope_named(name: str, options: Mapping[str, Any]) -> Scope:
    """The scope of that name. Raises `SpecError` listing the names, or for an option that it does not have."""
    known = {point.name: point for point in entry_points(group=GROUP)}
    if name not in known:
        raise SpecError(f"scope {name!r} is unknown; there are {', '.join(sorted(known))}")
    scope: Scope = known[name].load().create(options)
    return scope
