"""Server optimizers: the change that a merge makes is taken for a gradient (Reddi et al., arXiv 2003.00295, algorithm 2).

    D = merged - start
    momentum (FedAvgM, Hsu et al., arXiv 1909.06335)   m' = b1 m + D                    x' = x + eta m'
    adam     (FedAdam)   m' = b1 m + (1 - b1) D    v' = b2 v + (1 - b2) D^2              x' = x + eta m' / (sqrt(v') + tau)
    yogi     (FedYogi)   m' the same               v' = v - (1 - b2) D^2 sign(v - D^2)   x' the same

Moments start at 0 and tau^2, are float32, and belong to one model: when a candidate is rolled back, the next merge starts
from the moments of the model that stayed. They mean nothing across a change of basis, so rules that re-factorise refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from aggregator.merge.settings import ServerSettings
from edge_sdk.tensors import Array, Tensors

OPTIMIZERS: Final = ("none", "momentum", "adam", "yogi")


def server_step(
    settings: ServerSettings, start: Tensors, merged: Tensors, moments: Tensors
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The model after one step from `start`, and the new moments (`m.<name>`, `v.<name>`; empty before the first step)."""
    model: dict[str, Array] = {}
    kept: dict[str, Array] = {}
    for name, value in merged.items():
        old = start[name].astype(np.float64)
        change = value.astype(np.float64) - old
        first = _moment(moments, f"m.{name}", old, 0.0)
        if settings.optimizer == "momentum":
            first = settings.beta1 * first + change
            step = first
        else:
            first = settings.beta1 * first + (1 - settings.beta1) * change
            second = _moment(moments, f"v.{name}", old, settings.tau**2)
            square = change**2
            if settings.optimizer == "adam":
                second = settings.beta2 * second + (1 - settings.beta2) * square
            else:
                second = second - (1 - settings.beta2) * square * np.sign(second - square)
            step = first / (np.sqrt(second) + settings.tau)
            kept[f"v.{name}"] = second.astype(np.float32)
        kept[f"m.{name}"] = first.astype(np.float32)
        model[name] = (old + settings.learning_rate * step).astype(np.float32)
    return model, kept


def _moment(moments: Mapping[str, Array], name: str, like: Array, initial: float) -> Array:
    return moments[name].astype(np.float64) if name in moments else np.full(like.shape, initial)
