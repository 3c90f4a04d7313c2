"""Rules for LoRA adapters, layer by layer (methods/lora.md). B (m, r), A (r, n), s = alpha / r; the target of a round is

    dW* = sum_k p_k s_k B_k A_k

"Exact" below means exact with respect to this mean of products. It says nothing about biases, norms and heads trained
beside the adapter, which merge by `mean`.

| rule             | result                                                        | exact        | ranks | state     |
|------------------|---------------------------------------------------------------|--------------|-------|-----------|
| `factor_mean`    | B' = mean B, A' = mean A                                      | no, (E1)     | equal | `Updates` |
| `product_svd`    | the best rank-r form of dW*                                   | rank dW* <= r| any   | `Updates` |
| `freeze_a`       | A stays, B' = mean B (FFA-LoRA)                               | yes          | equal | `Sums`    |
| `alternate`      | B in one round, A in the next (RoLoRA)                        | yes          | equal | `Sums`    |
| `stack`          | dW* goes into the side term, the pair restarts (FLoRA)        | yes          | any   | `Updates` |
| `residual`       | factor means, and what they miss into the side term (FedEx)   | yes          | equal | `Updates` |
| `fair`           | A' = mean A, B' the ridge solution (LoRA-FAIR, closed form ours) | in the row space of A' | equal | `Updates` |
| `rank_partition` | column j of B, row j of A: mean over those who have it (RBLA) | no           | any   | `Updates` |
| `fedsvd`         | B trained only; (B', A') = SVD of mean B times A (FedSVD)     | yes          | equal | `Sums`    |

(E1)  dW* - s mean(B) mean(A) = s sum_k p_k (B_k - mean B)(A_k - mean A): a covariance of the clients' drifts.

The weight p_k enters one factor only. The scale enters in `Pair.product` and `Pair.split` and nowhere else. Sums are
float64 in sorted order, results float32; what is sent is reported against what was wanted (`truncation_error`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Final

import numpy as np

from aggregator.merge import Contribution, MergeError, MergeResult, Plan, State, cut_by_name
from aggregator.merge.low_rank import Float64, Svd, inner_products, product_norm, svd_of_product
from aggregator.merge.mean import trained_names
from aggregator.merge.sums import Sums
from aggregator.merge.updates import Updates
from edge_sdk.bundle import Program, TensorEntry
from edge_sdk.tensors import Array, Tensors

_DEAD: Final = 1e-7  # of the largest singular value: below it a direction has zero gradients for ever
REBASE_DUE: Final = 0.01  # relative tail of a side term (methods/lora.md, section 7)


@dataclass(frozen=True)
class Pair:
    """The two factors of one layer in one program: names in the table, scale, rank, (m, n), and which of them train."""

    layer: str
    a: str
    b: str
    scale: float
    rank: int
    shape: tuple[int, int]
    factors: str  # "ab", "a" or "b"

    def product(self, tensors: Tensors) -> tuple[Float64, Float64]:
        """(s B, A) in float64: the scale enters here."""
        return self.scale * tensors[self.b].astype(np.float64), tensors[self.a].astype(np.float64)

    def split(self, left: Float64, values: Float64, right: Float64, balance: str) -> tuple[Float64, Float64]:
        """(B, A) with `s B A = left * values @ right`: the scale leaves here."""
        if balance == "unit_a":
            return left * (values / self.scale), right.copy()
        root = np.sqrt(values / self.scale)
        return left * root, root[:, None] * right


@dataclass(frozen=True)
class Side:
    """The side term of a layer, `l @ q` added to the frozen weight: names in the table, and its capacity."""

    l: str  # noqa: E741 - the name in the literature
    q: str
    capacity: int


@dataclass(frozen=True)
class Block:
    """What one update brings to one layer: `p_k` and `s_k B_k`, `A_k`; `pair` says in which program."""

    weight: float
    b: Float64
    a: Float64
    pair: Pair

    @property
    def left(self) -> Float64:
        """`p_k s_k B_k`, the only place of the weight."""
        return self.weight * self.b


@dataclass(frozen=True)
class Target:
    """A sum of products `x @ y`, x (m, R), y (R, n), unevaluated."""

    x: Float64
    y: Float64

    def minus(self, b: Float64, a: Float64) -> Target:
        """This less `b @ a`."""
        return Target(np.concatenate([self.x, -b], axis=1), np.concatenate([self.y, a], axis=0))

    @property
    def norm(self) -> float:
        """Frobenius norm."""
        return product_norm(self.x, self.y)

    @classmethod
    def of(cls, blocks: Sequence[tuple[Float64, Float64]], shape: tuple[int, int]) -> Target:
        """The sum of these products."""
        if not blocks:
            return cls(np.zeros((shape[0], 0)), np.zeros((0, shape[1])))
        return cls(np.concatenate([x for x, _ in blocks], axis=1), np.concatenate([y for _, y in blocks], axis=0))


@dataclass(frozen=True)
class Layer:
    """One layer of a round, ready to merge. `blocks` are sorted; `wanted` is what the merged product should be."""

    pair: Pair
    start: Tensors
    blocks: tuple[Block, ...]
    wanted: Target
    fresh: Callable[[int], Array]  # a row of the initial distribution of A

    def means(self) -> tuple[Float64, Float64]:
        """(s mean B, mean A); equal ranks only."""
        b = np.zeros(self.blocks[0].b.shape)
        a = np.zeros(self.blocks[0].a.shape)
        for block in self.blocks:
            b += block.weight * block.b
            a += block.weight * block.a
        return b, a

    @property
    def equal(self) -> bool:
        """Whether all updates have the rank and the scale of the merged pair."""
        return all((block.pair.rank, block.pair.scale) == (self.pair.rank, self.pair.scale) for block in self.blocks)


@dataclass(frozen=True)
class Merged:
    """The new pair, `b` (m, r) without the scale and `a` (r, n), float64, and what goes into the side term.

    `norm` and `error` of wanted and missed, where the rule has them from its own arithmetic.
    """

    b: Float64
    a: Float64
    base_delta: Target | None = None
    norm: float | None = None
    error: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


LayerRule = Callable[[Layer, Plan], Merged]


def _product_svd(layer: Layer, plan: Plan) -> Merged:
    """`U S V^T = SVD(wanted)`, cut at the rank; the tail is dropped, or goes into the side term."""
    settings, pair = plan.settings.lora, layer.pair
    to_base = settings.residual == "base"
    svd = svd_of_product(layer.wanted.x, layer.wanted.y, None if to_base else pair.rank)
    rank = _kept(svd.values, settings.rank or pair.rank, settings.energy, pair.rank)
    b, a = _refactorised(layer, svd, rank, settings.balance)
    facts = {"rank": rank, **_spectrum(svd.values, layer)}
    if to_base:
        return Merged(b, a, Target(svd.left[:, rank:] * svd.values[rank:], svd.right[rank:]), facts=facts)
    return Merged(b, a, norm=svd.tail(0), error=svd.tail(rank), facts=facts)


def _factor_mean(layer: Layer, plan: Plan) -> Merged:  # noqa: ARG001
    b, a = layer.means()
    return Merged(b / layer.pair.scale, a)


def _stack(layer: Layer, plan: Plan) -> Merged:  # noqa: ARG001
    """Everything into the side term; the pair is as in a new job, with other rows."""
    m, n = layer.pair.shape
    a = np.array([layer.fresh(i) for i in range(layer.pair.rank)]).reshape(layer.pair.rank, n)
    return Merged(np.zeros((m, layer.pair.rank)), a, layer.wanted)


def _residual(layer: Layer, plan: Plan) -> Merged:  # noqa: ARG001
    b, a = layer.means()
    return Merged(b / layer.pair.scale, a, layer.wanted.minus(b, a))


def _fair(layer: Layer, plan: Plan) -> Merged:
    """B' = (dW* A'^T / s + lambda mean B) (A' A'^T + lambda I)^-1, by Cholesky; the published loss could not be consulted."""
    scaled_b, a = layer.means()
    damping = plan.settings.lora.fair_lambda
    projected = sum((block.left @ (block.a @ a.T) for block in layer.blocks), np.zeros_like(scaled_b))
    right = (projected + damping * scaled_b) / layer.pair.scale
    root = np.linalg.cholesky(a @ a.T + damping * np.eye(len(a)))
    return Merged(np.linalg.solve(root.T, np.linalg.solve(root, right.T)).T, a)


def _rank_partition(layer: Layer, plan: Plan) -> Merged:  # noqa: ARG001
    """Column j: mean over its owners, those of rank above j; without owners the old column stays."""
    b, a = layer.pair.product(layer.start)
    b, a = b.copy(), a.copy()
    for j in range(layer.pair.rank):
        owners = [block for block in layer.blocks if block.pair.rank > j]
        if owners:
            total = sum(block.weight for block in owners)
            b[:, j] = sum(block.weight * block.b[:, j] for block in owners) / total
            a[j] = sum(block.weight * block.a[j] for block in owners) / total
    return Merged(b / layer.pair.scale, a)


def _zero_padding(layer: Layer, plan: Plan) -> Merged:  # noqa: ARG001
    """`factor_mean` with missing columns counted as zero: the control of benchmarks/lora_study.py, and no rule of a job."""
    b, a = np.zeros((layer.pair.shape[0], layer.pair.rank)), np.zeros((layer.pair.rank, layer.pair.shape[1]))
    for block in layer.blocks:
        b[:, : block.pair.rank] += block.weight * block.b
        a[: block.pair.rank] += block.weight * block.a
    return Merged(b / layer.pair.scale, a)


def _kept(values: Float64, rank: int, energy: float, most: int) -> int:
    rank = min(rank, most)
    if energy > 0:
        squares = np.cumsum(values**2)
        if squares[-1] > 0:
            rank = min(rank, 1 + int(np.searchsorted(squares, energy * squares[-1])))
    return rank


def _refactorised(layer: Layer, svd: Svd, rank: int, balance: str) -> tuple[Float64, Float64]:
    """The first `rank` directions as (B, A) of the pair's rank; a dead one is a zero column and a fresh row, and can learn."""
    pair, (m, n) = layer.pair, layer.pair.shape
    largest = svd.values[0] if len(svd.values) else 0.0
    if largest == 0.0:
        return np.zeros((m, pair.rank)), layer.start[pair.a].astype(np.float64)
    alive = int(np.sum(svd.values[:rank] > _DEAD * largest))
    b, a = np.zeros((m, pair.rank)), np.zeros((pair.rank, n))
    b[:, :alive], a[:alive] = pair.split(svd.left[:, :alive], svd.values[:alive], svd.right[:alive], balance)
    for i in range(alive, pair.rank):
        a[i] = layer.fresh(i)
    return b, a


def _spectrum(values: Float64, layer: Layer) -> dict[str, Any]:
    squares = values**2
    total = float(squares.sum())
    if total == 0.0:
        return {}
    energy = squares / total
    alive = energy[energy > 0]
    smallest = min(block.pair.rank for block in layer.blocks)
    return {
        "energy": [float(e) for e in energy[: 2 * layer.pair.rank]],
        "effective_rank": float(np.exp(-np.sum(alive * np.log(alive)))),
        "tail_energy": float(energy[smallest:].sum()),
        "singular_values": [float(v) for v in values[: 2 * layer.pair.rank]],
    }


@dataclass(frozen=True)
class LoraRule:
    """A rule as an entry point: `create` makes its merger for one round.

    `factors`: what the programs of a round must train. `equal`: ranks and scales must agree. `changes_base`: needs a side
    term. `max_staleness`: how late an update may be at most.
    """

    name: str
    layer: LayerRule
    refactorises: bool
    equal: bool
    uses: frozenset[str]
    factors: str = "ab"
    changes_base: bool = False
    max_staleness: int = 0
    needs: type[Any] = Updates

    def create(self, plan: Plan) -> LoraMerger:
        """Raises `MergeError` if the rule does not fit the programs or the settings."""
        return LoraMerger(self, plan, *_layout(self, plan))


class _OfRule:
    """What a merger says of itself is what its rule says."""

    rule: LoraRule | OneFactorRule

    @property
    def refactorises(self) -> bool:
        """Whether the basis changes."""
        return self.rule.refactorises

    @property
    def needs(self) -> type[Any]:
        """`Updates` or `Sums`."""
        return self.rule.needs


@dataclass(frozen=True)
class LoraMerger(_OfRule):
    """One LoRA rule for one round: `pairs` of the merged program by layer, `of` those of each program, `sides` by layer."""

    rule: LoraRule
    plan: Plan
    pairs: Mapping[str, Pair]
    of: Mapping[str, Mapping[str, Pair]]
    sides: Mapping[str, Side]

    @property
    def others(self) -> tuple[str, ...]:
        """Tensors trained beside the adapter."""
        paired = {name for pairs in self.of.values() for pair in pairs.values() for name in (pair.a, pair.b)}
        return tuple(name for name in trained_names(self.plan) if name not in paired)

    def check(self, contribution: Contribution) -> None:
        """Refuse an update of a program that is not of this round, of an old gauge, or of another frozen factor."""
        if contribution.program not in self.of:
            known = ", ".join(self.of)
            raise MergeError(
                f"the update of {contribution.device!r} is of program {contribution.program!r}, not {known}"
            )
        if contribution.staleness > self.rule.max_staleness:
            raise MergeError(
                f"the update of {contribution.device!r} started {contribution.staleness} rounds ago; rule {self.rule.name} "
                f"takes at most {self.rule.max_staleness}: its factors belong to an old basis"
            )

    def empty(self) -> State:
        """All updates of the round."""
        names = {name for pairs in self.of.values() for pair in pairs.values() for name in (pair.a, pair.b)}
        return Updates([*sorted(names), *self.others])

    def finish(self, state: Updates, start: Tensors) -> MergeResult:
        """The merged pairs, and a report per layer and in all. Raises `MergeError`."""
        rows = state.contributions
        for row in rows:
            self.check(row)
        merged: dict[str, Array] = {}
        layers: dict[str, Any] = {}
        squares = np.zeros(3)  # of the norms: wanted, missed, missed by the mean of factors
        for name, pair in self.pairs.items():
            layer = self._layer(name, pair, state, rows, start)
            result = self.rule.layer(layer, self.plan)
            merged[pair.b], merged[pair.a] = result.b.astype(np.float32), result.a.astype(np.float32)
            report, norms = self._report(layer, result)
            squares += np.square(norms)
            if name in self.sides:
                report |= self._store_side(self.sides[name], pair, result.base_delta, start, merged)
            ranks = {pairs[name].rank for pairs in self.of.values() if name in pairs}
            layers[name] = {**report, "ranks": sorted(ranks)}
        merged |= _beside(state, rows, self.others, self.plan.settings.weights)
        missed = [float(np.sqrt(v / squares[0])) if squares[0] else 0.0 for v in squares[1:]]
        report = {"rule": self.rule.name, "norm": float(np.sqrt(squares[0])), "truncation_error": missed[0]}
        if all(entry["naive_error"] is not None for entry in layers.values()):
            report["naive_error"] = missed[1]
        return MergeResult(merged, {**report, "layers": layers})

    def cut(self, model: Tensors, program: Program) -> dict[str, Array]:
        """The first r_k columns of B and rows of A, B rescaled so that the product is that of the slice."""
        pairs = pairs_of(program, self.plan.table)
        mine = {name: pair for name, pair in self.pairs.items() if name in pairs}
        names = [n for n in program.reads if self.plan.table[n].kind != "a"]
        cut = {name: model[name] for name in names if name in model}
        for name, pair in mine.items():
            wanted = pairs[name]
            if (wanted.a, wanted.b) == (pair.a, pair.b):
                continue
            root = np.float32(np.sqrt(pair.scale / wanted.scale))
            cut[wanted.b] = np.ascontiguousarray(model[pair.b][:, : wanted.rank] * root)
            cut[wanted.a] = np.ascontiguousarray(model[pair.a][: wanted.rank] * root)
        return cut

    def _layer(self, name: str, pair: Pair, state: Updates, rows: Sequence[Contribution], start: Tensors) -> Layer:
        uniform = self.plan.settings.weights == "uniform"
        members = [(i, row) for i, row in enumerate(rows) if name in self.of[row.program]]
        if not members:
            raise MergeError(f"no update holds an adapter of layer {name!r}")
        total = sum(1 if uniform else row.num_examples for _, row in members)
        shares = [Fraction(1 if uniform else row.num_examples, total) for _, row in members]
        blocks = []
        for (index, row), share in zip(members, shares, strict=True):
            held = self.of[row.program][name]
            b, a = state.tensor(index, held.b), state.tensor(index, held.a)
            assert a is not None
            assert b is not None
            blocks.append(Block(float(share) * row.discount, *held.product({held.a: a, held.b: b}), held))
        coming = [row for _, row in members]
        changes = self._mode(pair, blocks, coming) == "change"
        if not changes and any(row.discount != 1.0 for row in coming):
            kept = sum(block.weight for block in blocks)
            blocks = [replace(block, weight=block.weight / kept) for block in blocks]
        wanted = Target.of([(block.left, block.a) for block in blocks], pair.shape)
        if changes:
            wanted = self._changed(name, pair, wanted, coming, shares, start)
        return Layer(pair, start, tuple(blocks), wanted, lambda i: self._fresh_row(name, i, pair.shape[1]))

    def _mode(self, pair: Pair, blocks: Sequence[Block], rows: Sequence[Contribution]) -> str:
        """ "mean" exactly where it agrees with "change": equal ranks, fresh updates, no discount."""
        if "lora.mode" not in self.rule.uses:
            return "mean"
        mode = self.plan.settings.lora.mode
        plain = all((block.pair.rank, block.pair.scale) == (pair.rank, pair.scale) for block in blocks)
        plain = plain and all(row.staleness == 0 and row.discount == 1.0 for row in rows)
        return "mean" if mode == "mean" or plain else "change"

    def _changed(
        self,
        name: str,
        pair: Pair,
        products: Target,
        rows: Sequence[Contribution],
        shares: Sequence[Fraction],
        start: Tensors,
    ) -> Target:
        """`D + sum_k p_k g_k (P_k - start_k)`.

        The fresh starts are slices of D, so they and D are one block whose column i has the weight 1 - q_i, q_i the share
        of the fresh updates that have it. The sums are of exact fractions and a column that cancels is left out, by rule
        and not by rounding. Late updates bring their own starts, one block for each distinct one.
        """
        fresh = [Fraction(1)] * pair.rank
        late: dict[str, tuple[Fraction, Contribution]] = {}
        for row, share in zip(rows, shares, strict=True):
            coefficient = share * Fraction(row.discount)
            if row.staleness == 0:
                for i in range(self.of[row.program][name].rank):
                    fresh[i] -= coefficient
            else:
                sum_so_far, _ = late.get(row.start_digest, (Fraction(0), row))
                late[row.start_digest] = (sum_so_far + coefficient, row)
        b, a = pair.product(start)
        columns = [i for i in range(pair.rank) if fresh[i] != 0]
        parts = [(products.x, products.y), (b[:, columns] * [float(fresh[i]) for i in columns], a[columns])]
        for coefficient, row in (late[key] for key in sorted(late)):
            old_b, old_a = self.of[row.program][name].product(row.start)
            parts.append((-float(coefficient) * old_b, old_a))
        return Target.of(parts, pair.shape)

    def _report(self, layer: Layer, result: Merged) -> tuple[dict[str, Any], tuple[float, float, float]]:
        """What was wanted, what is sent, and how far off the mean of factors would have been; norms are float64."""
        b, a = layer.pair.scale * result.b, result.a
        norm, error = result.norm, result.error
        if norm is None or error is None:
            missed = layer.wanted.minus(b, a)
            if result.base_delta is not None:
                missed = missed.minus(result.base_delta.x, result.base_delta.y)
            norm, error = layer.wanted.norm, missed.norm
        naive = _naive_error(layer) if layer.equal else None
        report = {
            "norm": norm,
            "truncation_error": error / (norm or 1.0),
            "naive_error": None if naive is None else naive / (norm or 1.0),
            "drift_cosine": _drift_cosines(layer),
            **result.facts,
        }
        return report, (norm, error, naive or 0.0)

    def _store_side(
        self, side: Side, pair: Pair, added: Target | None, start: Tensors, merged: dict[str, Array]
    ) -> dict[str, Any]:
        """The side term with `added`, recompressed to its capacity; an error above the tolerance means: rebase."""
        held = (start[side.l].astype(np.float64), start[side.q].astype(np.float64))
        if added is None:
            return {}
        svd = svd_of_product(*_joined(Target(*held), added))
        rank = min(side.capacity, len(svd.values))
        root = np.sqrt(svd.values[:rank])
        left, right = np.zeros((pair.shape[0], side.capacity)), np.zeros((side.capacity, pair.shape[1]))
        left[:, :rank], right[:rank] = svd.left[:, :rank] * root, root[:, None] * svd.right[:rank]
        merged[side.l], merged[side.q] = left.astype(np.float32), right.astype(np.float32)
        error = svd.tail(rank) / (float(np.linalg.norm(svd.values)) or 1.0)
        return {"side_error": error, "rebase_due": error > REBASE_DUE}

    def _fresh_row(self, layer: str, index: int, n: int) -> Array:
        """A row of the initial distribution, U(-sqrt(3/n), sqrt(3/n)) (methods/lora.md, section 2)."""
        text = f"{self.plan.seed}/{layer}/{self.plan.round}/{index}".encode()
        draw = np.random.Generator(np.random.Philox(key=int.from_bytes(hashlib.sha256(text).digest()[:8], "big")))
        return np.asarray(draw.uniform(-1.0, 1.0, n) * np.sqrt(3.0 / n))


@dataclass(frozen=True)
class OneFactorRule:
    """Rules of rounds that train one factor while the other is the same for all: linear sums. `svd`: re-factorise B A."""

    name: str
    refactorises: bool
    factors: tuple[str, ...]
    max_staleness: int
    uses: frozenset[str] = frozenset({"weights"})
    needs: type[Any] = Sums

    def create(self, plan: Plan) -> OneFactorMerger:
        """Raises `MergeError` for a program that trains both factors, or the other one."""
        for program in plan.trained.values():
            if program.factors not in self.factors:
                wanted = " or ".join(repr(f) for f in self.factors)
                raise MergeError(
                    f"rule {self.name} needs programs with factors {wanted}, {program.id!r} has {program.factors!r}: "
                    "export the bundle with scope options factors = ..., or choose another rule"
                )
        pairs = pairs_of(plan.program, plan.table)
        if not pairs:
            raise MergeError(f"rule {self.name} merges LoRA pairs and program {plan.program.id!r} has none")
        for program in plan.trained.values():
            for name, pair in pairs_of(program, plan.table).items():
                if (pair.a, pair.b) != (pairs[name].a, pairs[name].b):
                    raise MergeError(
                        f"rule {self.name} needs equal ranks; {program.id!r} has rank {pair.rank} at {name!r}"
                    )
        return OneFactorMerger(self, plan, pairs)


@dataclass(frozen=True)
class OneFactorMerger(_OfRule):
    """`freeze_a`, `alternate` and `fedsvd`: the mean of the factor that trains is the exact mean of products."""

    rule: OneFactorRule
    plan: Plan
    pairs: Mapping[str, Pair]

    def check(self, contribution: Contribution) -> None:
        """Refuse an update whose frozen factor is not the one of this round."""
        if contribution.program and contribution.program not in self.plan.trained:
            raise MergeError(
                f"the update of {contribution.device!r} is of program {contribution.program!r}, which this round does not train"
            )
        if contribution.staleness > self.rule.max_staleness:
            raise MergeError(
                f"the update of {contribution.device!r} started {contribution.staleness} rounds ago; rule {self.rule.name} "
                f"takes at most {self.rule.max_staleness}: its frozen factor is no longer the same"
            )

    def empty(self) -> Sums:
        """Sums of what trains."""
        return Sums(trained_names(self.plan), uniform=self.plan.settings.weights == "uniform")

    def finish(self, state: Sums, start: Tensors) -> MergeResult:
        """The mean of the trained factor beside the frozen one. Raises `MergeError`."""
        means = {name: state.mean(name) for name in state.names}
        merged = {name: value.astype(np.float32) for name, value in means.items()}
        norms = []
        for pair in self.pairs.values():
            b, a = (means[n] if n in means else start[n].astype(np.float64) for n in (pair.b, pair.a))
            norms.append(product_norm(pair.scale * b, a))
            if self.rule.refactorises:
                new_b, new_a = _orthonormal(pair, b, a, start)
                merged[pair.b], merged[pair.a] = new_b.astype(np.float32), new_a.astype(np.float32)
        norm = float(np.linalg.norm(norms))
        return MergeResult(merged, {"rule": self.rule.name, "norm": norm, "truncation_error": 0.0})

    def cut(self, model: Tensors, program: Program) -> dict[str, Array]:
        """Both factors, whichever of them trains."""
        return cut_by_name(model, program, self.plan.table)


def _orthonormal(pair: Pair, b: Float64, a: Float64, start: Tensors) -> tuple[Float64, Float64]:
    """U S V^T = B A, cut at nothing; A' = V^T has orthonormal rows, B' = U S carries the scale as B did."""
    svd = svd_of_product(pair.scale * b, a)
    if svd.values[0] == 0.0:
        return np.zeros_like(b), start[pair.a].astype(np.float64)
    return pair.split(svd.left[:, : pair.rank], svd.values[: pair.rank], svd.right[: pair.rank], "unit_a")


def pairs_of(program: Program, table: Mapping[str, TensorEntry]) -> dict[str, Pair]:
    """The pairs of a program by layer, whichever factors train. Raises `MergeError` for half a pair."""
    halves: dict[str, dict[str, TensorEntry]] = {}
    for name in program.reads:
        entry = table[name]
        if entry.merge in ("lora_a", "lora_b"):
            halves.setdefault(entry.layer or name, {})[entry.merge] = entry
    pairs = {}
    for layer, both in sorted(halves.items()):
        if set(both) != {"lora_a", "lora_b"}:
            raise MergeError(f"program {program.id!r} has only {next(iter(both))} of layer {layer!r}")
        a, b = both["lora_a"], both["lora_b"]
        if a.scale is None or a.scale <= 0 or a.scale != b.scale or a.shape[0] != b.shape[1]:
            raise MergeError(f"the factors of layer {layer!r} disagree in rank or scale: {a} and {b}")
        factors = "".join(f for f, entry in (("a", a), ("b", b)) if entry.name in program.tensors)
        pairs[layer] = Pair(layer, a.name, b.name, a.scale, a.shape[0], (b.shape[0], a.shape[1]), factors)
    return pairs


def sides_of(program: Program, table: Mapping[str, TensorEntry]) -> dict[str, Side]:
    """The side terms of a program by layer."""
    held: dict[str, dict[str, TensorEntry]] = {}
    for name in program.constants:
        entry = table[name]
        if entry.merge in ("side_l", "side_q"):
            held.setdefault(entry.layer or name, {})[entry.merge] = entry
    return {
        layer: Side(both["side_l"].name, both["side_q"].name, both["side_l"].shape[1]) for layer, both in held.items()
    }


def change_of(pair: Pair, tensors: Tensors, start: Tensors) -> float:
    """`|| P_k - start_k ||` of one layer, by QR: the same in every gauge (methods/lora.md, section 10)."""
    return Target(*pair.product(tensors)).minus(*pair.product(start)).norm


def compacted(blocks: Sequence[tuple[Float64, Float64]]) -> tuple[Float64, Float64]:
    """What a gateway under another one may send up: the sum of products in one block of least rank, without loss."""
    from aggregator.merge.low_rank import compact

    target = Target.of(blocks, (blocks[0][0].shape[0], blocks[0][1].shape[1]))
    return compact(target.x, target.y)


def _layout(rule: LoraRule, plan: Plan) -> tuple[dict[str, Pair], dict[str, dict[str, Pair]], dict[str, Side]]:
    program, table, settings = plan.program, plan.table, plan.settings.lora
    pairs, sides = pairs_of(program, table), sides_of(program, table)
    if not pairs:
        raise MergeError(f'rule {rule.name} merges LoRA pairs and program {program.id!r} has none: use rule = "mean"')
    of = {trained.id: pairs_of(trained, table) for trained in plan.trained.values()}
    for program_id, found in of.items():
        for layer, pair in found.items():
            if pair.factors != rule.factors:
                raise MergeError(
                    f"rule {rule.name} needs programs that train both factors; {program_id!r} trains {pair.factors!r} "
                    f"of layer {layer!r}: use freeze_a, alternate or fedsvd"
                )
            if layer not in pairs or pairs[layer].shape != pair.shape or pair.rank > pairs[layer].rank:
                raise MergeError(
                    f"layer {layer!r} of {program_id!r} does not fit into {program.id!r}: "
                    "let `program` name the program of the largest rank"
                )
            if rule.equal and (pair.rank, pair.scale) != (pairs[layer].rank, pairs[layer].scale):
                raise MergeError(
                    f"rule {rule.name} needs equal ranks and scales; {program_id!r} has rank {pair.rank} at {layer!r} and "
                    f"{program.id!r} rank {pairs[layer].rank}: use product_svd, stack or rank_partition"
                )
    if rule.changes_base or settings.residual == "base":
        missing = sorted(set(pairs) - set(sides))
        if missing:
            raise MergeError(
                f"rule {rule.name} changes the base and layer {missing[0]!r} of {program.id!r} has no side term: "
                "export the bundle with scope option side_rank = ..."
            )
    if rule.name == "fair" and settings.fair_lambda <= 0:
        raise MergeError(f"merge.lora.fair_lambda = {settings.fair_lambda:g} must be above 0")
    return pairs, of, sides


def _beside(state: Updates, rows: Sequence[Contribution], names: Sequence[str], weights: str) -> dict[str, Array]:
    """Head, norms and biases trained beside the adapter: their mean."""
    sums = Sums(names, uniform=weights == "uniform")
    if names:
        for index, row in enumerate(rows):
            held = {name: value for name in names if (value := state.tensor(index, name)) is not None}
            sums.add(Contribution(row.device, row.seq, row.num_examples, {}, held, discount=row.discount))
    return {name: sums.mean(name).astype(np.float32) for name in names}


def _joined(first: Target, second: Target) -> tuple[Float64, Float64]:
    return np.concatenate([first.x, second.x], axis=1), np.concatenate([first.y, second.y], axis=0)


def _naive_error(layer: Layer) -> float:
    """`|| dW - s mean(B) mean(A) ||`, what the mean of factors would have lost."""
    missed = layer.wanted.minus(*layer.means())
    return float(np.sqrt(max(0.0, inner_products(missed.x, missed.y, [missed.x.shape[1]])[0, 0])))


def _drift_cosines(layer: Layer) -> dict[str, float] | None:
    """Least and median cosine between a client's change and the mean one; None where ranks differ or nothing moved."""
    if not layer.equal:
        return None
    old = layer.pair.product(layer.start)
    stack = Target.of([*((block.b, block.a) for block in layer.blocks), old], layer.pair.shape)
    inner = inner_products(stack.x, stack.y, [layer.pair.rank] * (len(layer.blocks) + 1))
    drifts = inner[:-1, :-1] - inner[:-1, -1:] - inner[-1:, :-1] + inner[-1, -1]
    own = np.sqrt(np.maximum(np.diag(drifts), 0.0))
    weights = np.array([block.weight for block in layer.blocks])
    norm = np.sqrt(max(0.0, float(weights @ drifts @ weights)))
    moved = own > 0
    if norm == 0 or not moved.any():
        return None
    cosines = (drifts @ weights)[moved] / (own[moved] * norm)
    return {"min": float(cosines.min()), "median": float(np.median(cosines))}


_PLAIN: Final = frozenset({"weights"})

FACTOR_MEAN: Final = LoraRule("factor_mean", _factor_mean, refactorises=False, equal=True, uses=_PLAIN, max_staleness=1)
PRODUCT_SVD: Final = LoraRule(
    "product_svd",
    _product_svd,
    refactorises=True,
    equal=False,
    uses=_PLAIN | {"lora.rank", "lora.energy", "lora.balance", "lora.mode", "lora.residual"},
    max_staleness=3,
)
STACK: Final = LoraRule("stack", _stack, refactorises=True, equal=False, uses=_PLAIN, changes_base=True)
RESIDUAL: Final = LoraRule("residual", _residual, refactorises=True, equal=True, uses=_PLAIN, changes_base=True)
FAIR: Final = LoraRule(
    "fair", _fair, refactorises=True, equal=True, uses=_PLAIN | {"lora.fair_lambda"}, max_staleness=1
)
RANK_PARTITION: Final = LoraRule(
    "rank_partition", _rank_partition, refactorises=False, equal=False, uses=_PLAIN, max_staleness=1
)
ZERO_PADDING: Final = LoraRule("zero_padding", _zero_padding, refactorises=False, equal=False, uses=_PLAIN)
FREEZE_A: Final = OneFactorRule("freeze_a", refactorises=False, factors=("b",), max_staleness=3)
ALTERNATE: Final = OneFactorRule("alternate", refactorises=False, factors=("a", "b"), max_staleness=0)
FEDSVD: Final = OneFactorRule("fedsvd", refactorises=True, factors=("b",), max_staleness=0)
