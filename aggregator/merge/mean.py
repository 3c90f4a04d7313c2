"""The weighted mean of tensors: FedAvg (McMahan et al. 2017, algorithm 1) over what a program trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from aggregator.merge import ANY_STALENESS, Contribution, MergeResult, Plan, cut_by_name
from aggregator.merge.sums import BLOCK, Sums
from edge_sdk.bundle import Program
from edge_sdk.tensors import Array, Tensors


def trained_names(plan: Plan) -> tuple[str, ...]:
    """Every tensor that some program of the round trains, accumulators left out, in the order of the programs."""
    names = (name for program in plan.trained.values() for name in program.tensors)
    return tuple(dict.fromkeys(name for name in names if plan.table[name].kind != "a"))


@dataclass(frozen=True)
class MeanRule:
    """The rule as an entry point."""

    uses: frozenset[str] = frozenset({"weights"})
    max_staleness: int = ANY_STALENESS

    def create(self, plan: Plan) -> MeanMerger:
        """The rule fits every program."""
        return MeanMerger(plan)


@dataclass(frozen=True)
class MeanMerger:
    """Every trained tensor becomes the mean over updates, weighted by examples. It tolerates no hostile update at all."""

    plan: Plan
    refactorises: ClassVar[bool] = False
    needs: ClassVar[type[Any]] = Sums

    def check(self, contribution: Contribution) -> None:
        """Any update will do."""

    def empty(self) -> Sums:
        """Sums of every trained tensor."""
        return Sums(trained_names(self.plan), uniform=self.plan.settings.weights == "uniform")

    def finish(self, state: Sums, start: Tensors) -> MergeResult:
        """The means. Raises `MergeError` if there is nothing to merge."""
        merged = {name: state.mean(name, np.float32) for name in state.names}
        return MergeResult(merged, {"rule": "mean", "change_norm": change_norm(merged, start)})

    def cut(self, model: Tensors, program: Program) -> dict[str, Array]:
        """The tensors of that program."""
        return cut_by_name(model, program, self.plan.table)


def change_norm(merged: Tensors, start: Tensors) -> float:
    """The Frobenius norm of what a merge changed; in float64, by blocks that stay in cache."""
    total = 0.0
    for name, value in merged.items():
        new, old = value.reshape(-1), start[name].reshape(-1)
        for first in range(0, len(new), BLOCK):
            change = new[first : first + BLOCK].astype(np.float64) - old[first : first + BLOCK]
            total += float(np.dot(change, change))
    return float(np.sqrt(total))


MEAN: Final = MeanRule()
