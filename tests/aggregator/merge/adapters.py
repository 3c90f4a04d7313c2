"""Programs, tables and updates for tests of merge rules: adapters of any shape and rank, without a bundle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from aggregator.merge import Contribution, MergeResult, Plan, Rule, merge
from aggregator.merge.lora import pairs_of
from aggregator.merge.settings import LoraSettings, MergeSettings, RobustSettings
from edge_sdk.bundle import Program, TensorEntry

Shapes = Mapping[str, tuple[int, int]]


def program(
    shapes: Shapes,
    rank: int,
    *,
    scale: float = 2.0,
    factors: str = "ab",
    side: int = 0,
    extra: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[Program, dict[str, TensorEntry]]:
    """A LoRA program with one pair per layer of `shapes` (m, n), named by rank, and tensors `extra` beside them."""
    table: dict[str, TensorEntry] = {}
    trained: list[str] = []
    constants: list[str] = []

    def add(name: str, kind: str, merge: str, shape: tuple[int, ...], layer: str | None, trains: bool) -> None:
        mn = None if layer is None else shapes[layer]
        table[name] = TensorEntry(name, kind, "float32", shape, merge, layer, scale if layer else None, rank, mn, name)
        (trained if trains else constants).append(name)

    for layer, (m, n) in shapes.items():
        add(f"{layer}.r{rank}.lora_a", "p", "lora_a", (rank, n), layer, "a" in factors)
        add(f"{layer}.r{rank}.lora_b", "p", "lora_b", (m, rank), layer, "b" in factors)
        if side:
            add(f"{layer}.side_l", "c", "side_l", (m, side), layer, False)
            add(f"{layer}.side_q", "c", "side_q", (side, n), layer, False)
    for name, shape in (extra or {}).items():
        add(name, "p", "mean", shape, None, True)
    built = Program(
        id=f"test/lora/r{rank}" + ("" if factors == "ab" else f"/{factors}"),
        scope="lora",
        precision="float",
        stage=0,
        width=1.0,
        rank=rank,
        factors=factors,
        tensors=tuple(trained),
        constants=tuple(constants),
        infer="infer.onnx",
        prefix=(),
        step=(),
        partial_batch="mask",
        batch_default=8,
        batch_minimum=1,
        hyper={},
        samples="train",
        evaluate=None,
        score=None,
        state_bytes=0,
    )
    return built, table


class Site:
    """A round in a test: the programs of the ranks `ranks`, the merged one being that of the largest."""

    def __init__(
        self, shapes: Shapes, ranks: Sequence[int], *, dtype: Any = np.float64, seed: int = 0, **more: Any
    ) -> None:
        self.shapes, self.dtype = dict(shapes), dtype
        self.draw = np.random.default_rng(seed)
        built = {rank: program(shapes, rank, **more) for rank in sorted(set(ranks))}
        self.programs = {rank: entry[0] for rank, entry in built.items()}
        self.table = {name: row for _, table in built.values() for name, row in table.items()}
        self.main = self.programs[max(ranks)]

    def plan(self, *, lora: Any = None, robust: Any = None, weights: str = "examples", number: int = 1) -> Plan:
        settings = MergeSettings(
            weights=weights, lora=LoraSettings(**(lora or {})), robust=RobustSettings(**(robust or {}))
        )
        return Plan(self.main, {p.id: p for p in self.programs.values()}, self.table, settings, 7, number)

    def tensors(self, rank: int | None = None, spread: float = 1.0) -> dict[str, Any]:
        """Random values of everything that the program of this rank reads; side terms are zero."""
        chosen = self.main if rank is None else self.programs[rank]
        return {
            name: np.zeros(self.table[name].shape, self.dtype)
            if self.table[name].kind == "c"
            else self.draw.normal(0, spread, self.table[name].shape).astype(self.dtype)
            for name in chosen.reads
        }

    def update(
        self, number: int, rank: int, tensors: Any, start: Any, *, examples: int = 10, **more: Any
    ) -> Contribution:
        trained = {name: tensors[name] for name in self.programs[rank].tensors}
        return Contribution(
            f"dev-{number:02d}",
            1,
            examples,
            start,
            trained,
            self.programs[rank].id,
            **{"start_digest": f"{rank}", **more},
        )

    def product(self, tensors: Mapping[str, Any], layer: str, rank: int | None = None) -> np.ndarray:
        """s B A plus the side term, dense."""
        chosen = self.main if rank is None else self.programs[rank]
        pair = pairs_of(chosen, self.table)[layer]
        value = pair.scale * tensors[pair.b].astype(np.float64) @ tensors[pair.a].astype(np.float64)
        if f"{layer}.side_l" in tensors:
            value = value + tensors[f"{layer}.side_l"].astype(np.float64) @ tensors[f"{layer}.side_q"]
        return value

    def merged(self, rule: Rule, rows: Iterable[Contribution], start: Any, **settings: Any) -> MergeResult:
        """What the rule makes of the rows, sorted; the result beside the tensors that stay."""
        result = merge(rule.create(self.plan(**settings)), sorted(rows, key=lambda row: row.key), start)
        return MergeResult({**start, **result.tensors}, result.report)


def target(site: Site, rows: Sequence[Contribution], layer: str) -> np.ndarray:
    """dW*, dense: the mean of products, weighted by examples."""
    total = sum(row.num_examples for row in rows)
    ranks = {p.id: rank for rank, p in site.programs.items()}
    parts = []
    for row in rows:
        rank = ranks[row.program]
        held = {**row.start, **row.tensors}
        pair = pairs_of(site.programs[rank], site.table)[layer]
        parts.append(
            row.num_examples / total * pair.scale * held[pair.b].astype(np.float64) @ held[pair.a].astype(np.float64)
        )
    return np.sum(parts, axis=0)
