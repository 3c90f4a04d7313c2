"""The weighted mean of tensors: FedAvg (McMahan et al. 2017, algorithm 1) over what a program trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from aggregator.merge import Contribution, MergeResult, State
from edge_sdk.bundle import Program, TensorEntry
from edge_sdk.tensors import Array, Tensors


def weighted_mean(rows: Sequence[Contribution], name: str) -> Array:
    """`sum_k p_k X_k`, `p_k` = examples over all examples; summed in float64, float32 in the shape of the tensor."""
    total = sum(row.num_examples for row in rows)
    mean = np.zeros(rows[0].tensors[name].shape, np.float64)
    for row in rows:
        mean += row.num_examples / total * row.tensors[name].astype(np.float64)
    return mean.astype(np.float32)


@dataclass(frozen=True)
class MeanMerger:
    """Every trained tensor becomes the mean over updates, weighted by examples."""

    refactorises: ClassVar[bool] = False
    names: tuple[str, ...]

    @classmethod
    def create(cls, program: Program, table: Mapping[str, TensorEntry], settings: Any, seed: int, number: int) -> Self:
        """The rule needs nothing but the names of the tensors."""
        return cls(tuple(name for name in program.tensors if table[name].kind != "a"))

    def finish(self, state: State, start: Tensors) -> MergeResult:
        """The means. Raises `MergeError` if there is nothing to merge."""
        rows = state.in_order()
        merged = {name: weighted_mean(rows, name) for name in self.names}
        squares = sum(float(np.sum((merged[n].astype(np.float64) - start[n]) ** 2)) for n in self.names)
        return MergeResult(merged, {"rule": "mean", "change_norm": squares**0.5})
