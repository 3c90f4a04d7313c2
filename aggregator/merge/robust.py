"""Rules for rounds in which some devices are broken or hostile. All but `norm_clip` need all updates at once.

Weights: the number of examples is what a device claims, so these rules do not weigh by it. They work on the factors of
LoRA pairs as on any tensor, that is in the gauge of the round; what the mean of factors misses (E1 of
aggregator/merge/lora.py) they miss too.

| rule               | tolerates, of K updates                          | what for                                            |
|--------------------|--------------------------------------------------|-----------------------------------------------------|
| `norm_clip`        | any number, each with a bounded pull             | scaling; not sign flips                             |
| `median`           | fewer than K / 2                                 | any single coordinate, whatever its value           |
| `trimmed_mean`     | as many as are trimmed at each end               | the same, with less noise than the median           |
| `krum`             | f with K >= 2 f + 3                              | whole updates; picks one                            |
| `multi_krum`       | f with K >= 2 f + 3                              | the same, with the mean of several                  |
| `geometric_median` | fewer than K / 2                                 | whole updates; between mean and median              |

What none of them does: tell a rare device from a hostile one. Under strong skew the median and Krum cost accuracy even
without an attack (benchmarks/robust_study.py).

Memory: blocks of all updates (`Updates.blocks`), and one Gram matrix K x K; time: one pass, two for those that average
what they chose.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from aggregator.merge import ANY_STALENESS, Contribution, MergeError, MergeResult, Plan, cut_by_name
from aggregator.merge.mean import change_norm, trained_names
from aggregator.merge.settings import RobustSettings
from aggregator.merge.updates import Updates
from edge_sdk.bundle import Program
from edge_sdk.tensors import Array, Tensors

SORT_BLOCK: Final = 4096  # elements of every update while sorting: one client's lane after another in cache
GRAM_BLOCK: Final = 8192
_WEISZFELD_STEPS: Final = 200
_WEISZFELD_TOLERANCE: Final = 1e-9  # of each weight: the weight of a far update falls by a factor a step

Float64 = npt.NDArray[np.float64]
Choose = Callable[[Float64, RobustSettings], tuple[Float64, dict[str, Any]]]
Reduce = Callable[[Array, RobustSettings], Array]


def tolerated(count: int, settings: RobustSettings) -> int:
    """How many of `count` updates may be hostile, by the share that the job file names."""
    return math.ceil(settings.attackers * count - 1e-9)


def _median(lanes: Array, settings: RobustSettings) -> Array:  # noqa: ARG001
    """The middle of each lane `[n, K]`, of the two middle ones their mean (Yin et al., arXiv 1803.01498, definition 1)."""
    count = lanes.shape[1]
    lanes.sort(axis=1)
    if count % 2:
        return np.asarray(lanes[:, count // 2])
    return np.asarray((lanes[:, count // 2 - 1] + lanes[:, count // 2]) * lanes.dtype.type(0.5))


def _trimmed_mean(lanes: Array, settings: RobustSettings) -> Array:
    """The mean of each lane without its ends (Yin et al., definition 2). Raises `MergeError` if nothing would be left."""
    count = lanes.shape[1]
    cut = tolerated(count, settings)
    if 2 * cut >= count:
        raise MergeError(f"trimmed_mean would trim {cut} of {count} updates at each end: lower merge.robust.attackers")
    lanes.sort(axis=1)
    return np.asarray(lanes[:, cut : count - cut].mean(axis=1, dtype=np.float64))


def _krum_scores(gram: Float64, settings: RobustSettings) -> tuple[Float64, int]:
    count = len(gram)
    hostile = tolerated(count, settings)
    if count < 2 * hostile + 3:
        raise MergeError(
            f"krum with {hostile} hostile updates needs at least {2 * hostile + 3}, found {count}: "
            "wait for more devices (round.minimum) or lower merge.robust.attackers"
        )
    squares = np.diag(gram)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2 * gram, 0.0)
    np.fill_diagonal(distances, np.inf)
    nearest = np.sort(distances, axis=1)[:, : count - hostile - 2]
    return nearest.sum(axis=1), hostile


def _krum(gram: Float64, settings: RobustSettings) -> tuple[Float64, dict[str, Any]]:
    """The update with the nearest K - f - 2 neighbours (Blanchard et al. 2017, section 4)."""
    scores, _ = _krum_scores(gram, settings)
    chosen = int(np.argmin(scores))
    return np.eye(len(gram))[chosen], {"chosen": [chosen]}


def _multi_krum(gram: Float64, settings: RobustSettings) -> tuple[Float64, dict[str, Any]]:
    """The mean of the `keep` updates with the best scores, K - f of them unless the job file says how many."""
    scores, hostile = _krum_scores(gram, settings)
    keep = min(settings.keep or len(gram) - hostile, len(gram))
    chosen = np.sort(np.argsort(scores, kind="stable")[:keep])
    weights = np.zeros(len(gram))
    weights[chosen] = 1.0 / keep
    return weights, {"chosen": [int(i) for i in chosen]}


def _geometric_median(gram: Float64, settings: RobustSettings) -> tuple[Float64, dict[str, Any]]:  # noqa: ARG001
    """The point with the least sum of distances, by smoothed Weiszfeld steps (Pillutla et al., arXiv 1912.13445, algorithm 2).

    It lies in the convex hull of the updates, so each step needs the Gram matrix and no update.
    """
    weights = np.full(len(gram), 1.0 / len(gram))
    floor = 1e-6 * float(np.median(np.sqrt(np.diag(gram)))) or 1e-12  # the median: a mean would be the attackers'
    for _ in range(_WEISZFELD_STEPS):
        squares = np.diag(gram) - 2 * gram @ weights + weights @ gram @ weights
        inverse = 1.0 / np.maximum(np.sqrt(np.maximum(squares, 0.0)), floor)
        before, weights = weights, inverse / inverse.sum()
        if (np.abs(weights - before) <= _WEISZFELD_TOLERANCE * before).all():
            break
    return weights, {"weights": [float(w) for w in weights]}


def _clip(gram: Float64, settings: RobustSettings) -> tuple[Float64, dict[str, Any]]:
    """Every change is cut to the bound, by default the median of the norms, and the mean is taken.

    After Sun et al., arXiv 1911.07963, section 3.
    """
    norms = np.sqrt(np.diag(gram))
    bound = settings.clip or float(np.median(norms))
    factors = np.minimum(1.0, bound / np.maximum(norms, 1e-300))
    return factors / len(gram), {"bound": bound, "clipped": int((factors < 1.0).sum())}


@dataclass(frozen=True)
class RobustRule:
    """A rule as an entry point: either by coordinate (`reduce`) or by whole updates (`choose` weighs them)."""

    name: str
    uses: frozenset[str]
    reduce: Reduce | None = None
    choose: Choose | None = None
    max_staleness: int = ANY_STALENESS

    def create(self, plan: Plan) -> RobustMerger:
        """Raises `MergeError` if programs of different tensors train, which no coordinate can be compared in."""
        sets = {frozenset(n for n in p.tensors if plan.table[n].kind != "a") for p in plan.trained.values()}
        if len(sets) > 1:
            raise MergeError(
                f"rule {self.name} needs every device to train the same tensors; the round has {len(sets)} sets"
            )
        return RobustMerger(self, plan)


@dataclass(frozen=True)
class RobustMerger:
    """One robust rule for one round."""

    rule: RobustRule
    plan: Plan

    @property
    def refactorises(self) -> bool:
        """Never."""
        return False

    @property
    def needs(self) -> type[Any]:
        """All updates at once."""
        return Updates

    def check(self, contribution: Contribution) -> None:
        """Any update will do."""

    def empty(self) -> Updates:
        """All updates of the round."""
        return Updates(trained_names(self.plan))

    def finish(self, state: Updates, start: Tensors) -> MergeResult:
        """The merged tensors. Raises `MergeError`."""
        rows = state.contributions
        settings = self.plan.settings.robust
        facts: dict[str, Any] = {}
        if self.rule.choose is None:
            assert self.rule.reduce is not None
            merged = {name: _reduced(state, name, self.rule.reduce, settings) for name in state.names}
        else:
            weights, facts = self.rule.choose(gram(state, start), settings)
            merged = {name: _combined(state, name, start[name], weights) for name in state.names}
            if "chosen" in facts:
                facts["chosen"] = [rows[i].device for i in facts["chosen"]]
        report = {"rule": self.rule.name, "change_norm": change_norm(merged, start), **facts}
        return MergeResult(merged, report)

    def cut(self, model: Tensors, program: Program) -> dict[str, Array]:
        """The tensors of that program."""
        return cut_by_name(model, program, self.plan.table)


def gram(state: Updates, start: Tensors) -> Float64:
    """The inner products of all changes, float64 `[K, K]`; blocks are multiplied in the tensors' precision."""
    count = len(state)
    total = np.zeros((count, count))
    for name in state.names:
        old = start[name].reshape(-1)
        for first, values in state.blocks(name, GRAM_BLOCK):
            changes = np.subtract(values, old[first : first + values.shape[1]], out=values)
            with np.errstate(over="ignore", invalid="ignore"):
                products = changes @ changes.T
            if not np.isfinite(products).all():  # a hostile number whose square is beyond float32
                wide = changes.astype(np.float64)
                products = wide @ wide.T
            total += products
    return total


def _reduced(state: Updates, name: str, reduce: Reduce, settings: RobustSettings) -> Array:
    parts = [
        reduce(np.ascontiguousarray(values.T), settings).astype(np.float32)
        for _, values in state.blocks(name, SORT_BLOCK)
    ]
    first = state.tensor(0, name)
    assert first is not None
    return np.concatenate(parts).reshape(first.shape)


def _combined(state: Updates, name: str, start: Array, weights: Float64) -> Array:
    """`start + sum_k weights_k (X_k - start)`, float64 sums; rows of weight 0 are not read."""
    total = (1.0 - weights.sum()) * start.reshape(-1).astype(np.float64)
    for index in np.flatnonzero(weights):
        value = state.tensor(int(index), name)
        assert value is not None
        total += weights[index] * value.reshape(-1).astype(np.float64)
    return np.asarray(total.astype(np.float32).reshape(start.shape))


_ATTACKERS: Final = frozenset({"robust.attackers"})
NORM_CLIP: Final = RobustRule("norm_clip", frozenset({"robust.clip"}), choose=_clip)
MEDIAN: Final = RobustRule("median", frozenset(), reduce=_median)
TRIMMED_MEAN: Final = RobustRule("trimmed_mean", _ATTACKERS, reduce=_trimmed_mean)
KRUM: Final = RobustRule("krum", _ATTACKERS, choose=_krum)
MULTI_KRUM: Final = RobustRule("multi_krum", _ATTACKERS | {"robust.keep"}, choose=_multi_krum)
GEOMETRIC_MEDIAN: Final = RobustRule("geometric_median", frozenset(), choose=_geometric_median)
