"""Scopes that train the model's own tensors: the last layer, named modules, or everything."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import onnx_ir as ir

from export.errors import SpecError, UnknownTensor
from export.graph import array_of
from export.scopes import Applied, Trainable


def train_tensors(model: ir.Model, names: Sequence[str]) -> Applied:
    """Make these constants inputs `p.<name>`."""
    graph = model.graph
    trainables = []
    for name in names:
        value = graph.initializers[name]
        array = array_of(value)
        assert array is not None
        trainables.append(Trainable(name, array))
        del graph.initializers[name]
        value.name, value.const_value = f"p.{name}", None
        graph.inputs.append(value)
    return Applied(tuple(trainables), lambda trained, _frozen: dict(trained))


def _no_options(scope: str, options: Mapping[str, Any], *known: str) -> None:
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise SpecError(f"scope {scope} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")


@dataclass(frozen=True)
class HeadScope:
    """The last layer: weight and bias of the node with trainable constants that is nearest to the output."""

    rank: ClassVar[int] = 0
    factors: ClassVar[str] = ""
    label: ClassVar[str] = ""

    @classmethod
    def create(cls, options: Mapping[str, Any]) -> Self:
        """It has no options."""
        _no_options("head", options)
        return cls()

    def apply(self, model: ir.Model, parameters: Sequence[str], seed: int) -> Applied:  # noqa: ARG002
        """Train what the last such node reads."""
        names = self.tensors(model.graph, parameters)
        if not names:
            raise UnknownTensor("layer", "*", [])
        return train_tensors(model, names)

    @staticmethod
    def tensors(graph: ir.Graph, parameters: Sequence[str]) -> list[str]:
        """Names of the last layer's tensors; none where no node reads a trainable constant."""
        for node in reversed(list(graph)):
            held = [str(value.name) for value in node.inputs if value is not None and value.name in parameters]
            producers = [value.producer() for value in node.inputs if value is not None]
            # A linear layer may read its weight through a Transpose, and its bias in an Add behind the product.
            for producer in producers:
                if producer is not None and producer.op_type in ("Transpose", "MatMul"):
                    held += [str(v.name) for v in _constants_of(producer) if v.name in parameters]
            if held:
                return sorted(set(held), key=list(parameters).index)
        return []


def _constants_of(node: ir.Node) -> list[ir.Value]:
    found = [value for value in node.inputs if value is not None]
    for value in list(found):
        producer = value.producer()
        if producer is not None and producer.op_type == "Transpose":
            found += [source for source in producer.inputs if source is not None]
    return found


@dataclass(frozen=True)
class LayerScope:
    """Named modules, by pattern: `modules = ["conv3", "head*"]`."""

    modules: tuple[str, ...]
    rank: ClassVar[int] = 0
    factors: ClassVar[str] = ""

    @classmethod
    def create(cls, options: Mapping[str, Any]) -> Self:
        """Needs `modules`, a list of names or patterns."""
        _no_options("layer", options, "modules")
        modules = options.get("modules", ())
        if not modules or isinstance(modules, str) or not all(isinstance(name, str) for name in modules):
            raise SpecError(f"scope layer needs modules = [names or patterns], found {modules!r}")
        return cls(tuple(modules))

    @property
    def label(self) -> str:
        """The modules' names."""
        return "+".join(name.replace("*", "") for name in self.modules)

    def apply(self, model: ir.Model, parameters: Sequence[str], seed: int) -> Applied:  # noqa: ARG002
        """Train every parameter of the modules that match. Raises `UnknownTensor` for a pattern that matches none."""
        chosen: set[str] = set()
        for pattern in self.modules:
            matches = [name for name in parameters if _belongs(name, pattern)]
            if not matches:
                modules = sorted({name.rpartition(".")[0] or name for name in parameters})
                raise UnknownTensor("module", pattern, modules)
            chosen.update(matches)
        return train_tensors(model, [name for name in parameters if name in chosen])


def _belongs(name: str, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(part, pattern) for part in (name, name.rpartition(".")[0])) or name.startswith(
        f"{pattern}."
    )


@dataclass(frozen=True)
class FullScope:
    """Every parameter; running statistics and other constants stay as they are."""

    rank: ClassVar[int] = 0
    factors: ClassVar[str] = ""
    label: ClassVar[str] = ""

    @classmethod
    def create(cls, options: Mapping[str, Any]) -> Self:
        """It has no options."""
        _no_options("full", options)
        return cls()

    def apply(self, model: ir.Model, parameters: Sequence[str], seed: int) -> Applied:  # noqa: ARG002
        """Train all of them."""
        if not parameters:
            raise UnknownTensor("tensor", "*", [])
        return train_tensors(model, parameters)
