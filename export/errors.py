"""What can be wrong with a model, its specification or its graphs; nothing is written when one of these is raised."""

from __future__ import annotations

from collections.abc import Sequence

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
    """A pattern that names no tensor or layer of the model."""


class NotDifferentiable(ExportError):
    """A trainable tensor that cannot influence the loss."""


class ContractError(ExportError):
    """A graph that breaks the contract of step-graphs.md, section 2."""


class ProofFailed(ExportError):
    """A step graph whose loss or gradients differ from the oracle's."""

    exit_code = 5


class NoGradientRule(ExportError):
    """Operators between the trainable tensors and the loss that have no rule, or a rule without this attribute.

    `findings` holds one line per node.
    """

    def __init__(self, findings: Sequence[str]) -> None:
        count = f"{len(findings)} operator{'s' if len(findings) > 1 else ''}"
        super().__init__(
            f"{count} on the path from the trainable tensors to the loss cannot be differentiated: "
            + "; ".join(findings)
            + ". Train only tensors behind them (another scope, or other modules), or replace them in the model"
        )
        self.findings = tuple(findings)
