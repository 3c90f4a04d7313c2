"""`product_svd`: the mean of the clients' products, cut to the adapter's rank (methods/lora.md, sections 3 and 4).

The target is `dW* = sum_k p_k s_k B_k A_k`, B (m, r), A (r, n), s = alpha / r. The mean of the factors is not it: it is off
by the covariance of the clients' drifts (E1). The best rank-r approximation of dW* comes from a QR-SVD of the stacked
factors; `balance = even` shares the singular values equally between the two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from aggregator.merge import Contribution, MergeError, MergeResult, State
from aggregator.merge.low_rank import Svd, svd_of_product
from aggregator.merge.mean import weighted_mean
from edge_sdk.bundle import Program, TensorEntry
from edge_sdk.tensors import Array, Tensors

_DEAD = 1e-7  # of the largest singular value: below it a direction has zero gradients for ever


@dataclass(frozen=True)
class Pair:
    """The two factors of one layer: names in the table, scale, rank."""

    layer: str
    a: str
    b: str
    scale: float
    rank: int


@dataclass(frozen=True)
class ProductSvdMerger:
    """LoRA pairs become the best rank-r form of the mean product; every other tensor its mean."""

    refactorises: ClassVar[bool] = True
    pairs: tuple[Pair, ...]
    others: tuple[str, ...]
    seed: int
    round: int

    @classmethod
    def create(cls, program: Program, table: Mapping[str, TensorEntry], settings: Any, seed: int, number: int) -> Self:
        """Raises `MergeError` for a program without pairs, or with half of one."""
        pairs = _pairs(program, table)
        paired = {name for pair in pairs for name in (pair.a, pair.b)}
        others = tuple(n for n in program.tensors if n not in paired and table[n].kind != "a")
        return cls(pairs, others, seed, number)

    def finish(self, state: State, start: Tensors) -> MergeResult:
        """The merged factors. The report has, per layer and in all, relative errors of the cut and of the factor mean."""
        rows = state.in_order()
        merged: dict[str, Array] = {name: weighted_mean(rows, name) for name in self.others}
        layers: dict[str, Any] = {}
        sums = np.zeros(3)  # squared norms: target, cut, factor mean
        for pair in self.pairs:
            target = _mean_product(rows, pair)
            merged[pair.a], merged[pair.b] = self._factors(target, pair, start)
            norms = np.array([np.sum(target.values**2), target.tail(pair.rank) ** 2, _naive_error(rows, pair) ** 2])
            sums += norms
            layers[pair.layer] = {
                **_errors(norms),
                "singular_values": [float(v) for v in target.values[: 2 * pair.rank]],
            }
        return MergeResult(merged, {"rule": "product_svd", **_errors(sums), "layers": layers})

    def _factors(self, target: Svd, pair: Pair, start: Tensors) -> tuple[Array, Array]:
        rank, (m, n) = pair.rank, (target.left.shape[0], target.right.shape[1])
        if target.values[0] == 0.0:
            return np.array(start[pair.a]), np.zeros((m, rank), np.float32)
        a, b = np.zeros((rank, n)), np.zeros((m, rank))
        for i in range(rank):
            if i < len(target.values) and target.values[i] > _DEAD * target.values[0]:
                root = np.sqrt(target.values[i] / pair.scale)
                b[:, i], a[i] = target.left[:, i] * root, target.right[i] * root
            else:  # a fresh row with a zero column: the function is the same, and the direction can learn
                a[i] = self._fresh_row(pair.layer, i, n)
        return a.astype(np.float32), b.astype(np.float32)

    def _fresh_row(self, layer: str, index: int, n: int) -> Array:
        """A row of the initial distribution, U(-sqrt(3/n), sqrt(3/n)) (methods/lora.md, section 2)."""
        text = f"{self.seed}/{layer}/{self.round}/{index}".encode()
        draw = np.random.Generator(np.random.Philox(key=int.from_bytes(hashlib.sha256(text).digest()[:8], "big")))
        return np.asarray(draw.uniform(-1.0, 1.0, n) * np.sqrt(3.0 / n))


def _pairs(program: Program, table: Mapping[str, TensorEntry]) -> tuple[Pair, ...]:
    halves: dict[str, dict[str, TensorEntry]] = {}
    for name in program.tensors:
        entry = table[name]
        if entry.merge in ("lora_a", "lora_b"):
            halves.setdefault(entry.layer or name, {})[entry.merge] = entry
    pairs = []
    for layer, both in sorted(halves.items()):
        if set(both) != {"lora_a", "lora_b"}:
            raise MergeError(f"program {program.id!r} has only {next(iter(both))} of layer {layer!r}")
        a, b = both["lora_a"], both["lora_b"]
        if a.scale is None or a.scale <= 0 or a.scale != b.scale or a.shape[0] != b.shape[1]:
            raise MergeError(f"the factors of layer {layer!r} disagree in rank or scale: {a} and {b}")
        pairs.append(Pair(layer, a.name, b.name, a.scale, a.shape[0]))
    if not pairs:
        raise MergeError(f'rule product_svd merges LoRA pairs and program {program.id!r} has none: use rule = "mean"')
    return tuple(pairs)


def _mean_product(rows: list[Contribution], pair: Pair) -> Svd:
    """The SVD of dW*: weight and scale enter the left stack, once."""
    total = sum(row.num_examples for row in rows)
    left = [row.num_examples / total * pair.scale * row.tensors[pair.b].astype(np.float64) for row in rows]
    right = [row.tensors[pair.a].astype(np.float64) for row in rows]
    return svd_of_product(np.concatenate(left, axis=1), np.concatenate(right, axis=0))


def _naive_error(rows: list[Contribution], pair: Pair) -> float:
    """|| dW* - s mean(B) mean(A) ||, by the same routine with the factor mean appended."""
    total = sum(row.num_examples for row in rows)
    weights = [row.num_examples / total for row in rows]
    b = [row.tensors[pair.b].astype(np.float64) for row in rows]
    a = [row.tensors[pair.a].astype(np.float64) for row in rows]
    mean_b = sum(w * value for w, value in zip(weights, b, strict=True))
    mean_a = sum(w * value for w, value in zip(weights, a, strict=True))
    left = [w * pair.scale * value for w, value in zip(weights, b, strict=True)]
    product = svd_of_product(
        np.concatenate([*left, -pair.scale * mean_b], axis=1), np.concatenate([*a, mean_a], axis=0)
    )
    return product.tail(0)


def _errors(squares: Any) -> dict[str, float]:
    """Norm of the target, and relative errors of the cut and of the factor mean."""
    target, cut, naive = (float(np.sqrt(value)) for value in squares)
    scale = target or 1.0
    return {"norm": target, "truncation_error": cut / scale, "naive_error": naive / scale}
