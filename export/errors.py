"""What can be wrong with a model, its specification or its graphs; nothing is written when one of these is raised."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from edge_sdk.errors import EdgewiseError


class ExportError(EdgewiseError):
    """The bundle cannot be built."""


class SpecError(ExportError):
    """An export specification that cannot be used as it is."""


class UnsupportedModel(ExportError):
    """A model that this exporter cannot read: what was found, and where."""


class UnknownShape(ExportError):
    """An axis whose size must be known, or equal to another, and is not."""


class UnknownTensor(ExportError):
    """A pattern that names no tensor or layer of the model; the message says which names come near it."""

    def __init__(self, what: str, pattern: str, names: Sequence[str]) -> None:
        near = difflib.get_close_matches(pattern.replace("*", ""), names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        super().__init__(f"{what} {pattern!r} matches nothing: {hint}there are {', '.join(names) or 'none'}")


class NotDifferentiable(ExportError):
    """A trainable tensor that reaches the loss through integers, comparisons or rounding only."""


class DisconnectedTrainable(ExportError):
    """No trainable tensor influences the loss."""


class ContractError(ExportError):
    """A graph that breaks the contract of step-graphs.md, section 2."""


class ProofFailed(ExportError):
    """A step graph whose loss or gradients differ from the oracle's."""

    exit_code = 5


@dataclass(frozen=True)
class Finding:
    """A node that cannot be differentiated: operator, name, a trainable tensor before it, the operators on the way from
    there to the loss, and the attribute that its rule does not cover (empty: it has no rule)."""

    operator: str
    node: str
    trainable: str
    way: tuple[str, ...]
    reason: str = ""

    def __str__(self) -> str:
        way = " -> ".join((self.trainable.removeprefix("p."), *self.way, "loss"))
        without = f", whose rule does not cover {self.reason}" if self.reason else ""
        return f"{self.operator}  node {self.node!r}{without}  between {self.trainable} and the loss  ({way})"


class NoGradientRule(ExportError):
    """Operators between the trainable tensors and the loss that have no rule, or a rule that does not cover an attribute.

    `behind` names the tensors that can train without them.
    """

    def __init__(self, findings: Sequence[Finding], behind: Sequence[str]) -> None:
        count = f"{len(findings)} operator{'s' if len(findings) > 1 else ''}"
        remedies = [_INSTEAD[name] for name in _INSTEAD if any(finding.operator == name for finding in findings)]
        if behind:
            shown = ",".join(behind[:_SHOWN]) + (f" and {len(behind) - _SHOWN} more" if len(behind) > _SHOWN else "")
            remedies.insert(0, f"train only tensors behind them, which need no rule for them: {shown}")
        else:
            remedies.insert(0, "no tensor lies behind them: replace them in the model")
        remedies.append("write a rule: docs/gradient-rules.md (a rule is one function and one test)")
        super().__init__(
            "\n".join(
                [
                    f"{count} on the path from the loss to the trainable tensors cannot be differentiated",
                    *(f"  {finding}" for finding in findings),
                    "What you can do:",
                    *(f"  - {remedy}" for remedy in remedies),
                ]
            )
        )
        self.findings = tuple(findings)


_SHOWN = 6
_INSTEAD = {
    "LSTM": "LSTM: forward, reverse or bidirectional with standard activations and at most 64 steps is unrolled for you",
    "GRU": "GRU: forward, reverse or bidirectional with standard activations and at most 64 steps is unrolled for you",
    "RNN": "replace RNN by GRU, or by an explicit cell",
    "Einsum": "replace Einsum by MatMul and Transpose; sums of products of two operands are rewritten for you",
    "Resize": "keep Resize in the frozen part, or replace it by ConvTranspose",
    "GridSample": "keep GridSample in the frozen part",
}
