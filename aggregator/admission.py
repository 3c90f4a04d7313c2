"""Whether the body of an update may be merged: shapes, finite numbers, and a norm that is not absurd.

The norm of a change is that of what it does to the model: for a LoRA pair `|| P - P_start ||`, the product of the factors,
which is the same in every basis; for other tensors the difference itself. The bound depends on closed rounds only, never
on what arrived in this one, so the order of arrival decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from aggregator.merge.lora import change_of, pairs_of
from edge_sdk.bundle import Program, TensorEntry
from edge_sdk.errors import EdgewiseError, UpdateError
from edge_sdk.tensors import Array, Tensors
from edge_sdk.update import KINDS, decode_update

_TIMES_MEDIAN = 10.0
_FIRST_ROUND = 1000.0


class Refused(EdgewiseError):
    """An update that is not merged: a short `reason` for the journal, and the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def admit(
    body: bytes,
    program: Program,
    table: Mapping[str, TensorEntry],
    start: Tensors,
    *,
    start_digest: str | None = None,
    norm_bound: float | None,
    encodings: Sequence[str] = KINDS,
) -> dict[str, Array]:
    """Decode a body into absolute tensors, or raise `Refused`. `norm_bound` limits the Frobenius norm of the change,
    `encodings` the kinds of encoding.
    """
    try:
        tensors = decode_update(body, program, table, start, start_digest, allowed=encodings)
    except UpdateError as error:
        raise Refused(error.reason, error.detail) from error
    if norm_bound is not None:
        norm = change_norm(tensors, start, program, table)
        if not norm <= norm_bound:
            raise Refused("norm", f"the change has norm {norm:.3g}, at most {norm_bound:.3g} is accepted")
    return tensors


def change_norm(tensors: Tensors, start: Tensors, program: Program, table: Mapping[str, TensorEntry]) -> float:
    """The Frobenius norm of what an update does to the model, in float64."""
    pairs = pairs_of(program, table)
    paired = {name for pair in pairs.values() for name in (pair.a, pair.b)}
    moved = {**start, **tensors}
    squares = [change_of(pair, moved, start) ** 2 for pair in pairs.values()]
    squares += [
        float(np.sum((tensors[n].astype(np.float64) - start[n]) ** 2))
        for n in sorted(start)
        if n in tensors and n not in paired
    ]
    return float(np.sqrt(sum(squares)))


def norm_bound(previous: Sequence[float], start: Tensors) -> float:
    """Ten times the median of the norms merged in the last closed round, but never less than the norm of the model itself.

    Without that floor, devices that have converged shut out every device that still has something to teach: their norms
    go to zero, and the bound with them. Before a round has been merged: a thousand times the norm of the model.
    """
    model = max(1.0, float(np.sqrt(sum(float(np.sum(value.astype(np.float64) ** 2)) for value in start.values()))))
    if not previous:
        return _FIRST_ROUND * model
    return max(_TIMES_MEDIAN * float(np.median(previous)), model)
