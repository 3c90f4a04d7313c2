"""Robust rules: what each tolerates, and what it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from aggregator.merge import Contribution, MergeError, MergeResult, Plan, Rule, merge
from aggregator.merge.mean import MEAN
from aggregator.merge.robust import (
    GEOMETRIC_MEDIAN,
    KRUM,
    MEDIAN,
    MULTI_KRUM,
    NORM_CLIP,
    SORT_BLOCK,
    TRIMMED_MEAN,
    RobustRule,
)
from aggregator.merge.settings import MergeSettings, RobustSettings
from tests.aggregator.merge.adapters import program

PROGRAM, TABLE = program({}, 1, extra={"w": (SORT_BLOCK + 9,), "b": (3,)})
ROBUST = [MEDIAN, TRIMMED_MEAN, KRUM, MULTI_KRUM, GEOMETRIC_MEDIAN]
START = {name: np.zeros(TABLE[name].shape, np.float32) for name in PROGRAM.tensors}

Attack = Callable[[Any, np.random.Generator], Any]
ATTACKS: dict[str, Attack] = {
    "sign flip": lambda honest, draw: -5 * honest,
    "scaling": lambda honest, draw: 1000 * honest,
    "noise": lambda honest, draw: draw.normal(0, 30, honest.shape).astype(np.float32),
    "one huge number": lambda honest, draw: np.where(np.arange(honest.size) == 1, np.float32(1e30), honest),
}


def updates(count: int = 10, hostile: int = 0, attack: Attack | None = None, noise: float = 0.1) -> list[Contribution]:
    draw = np.random.default_rng(3)
    rows = []
    for k in range(count):
        tensors = {n: (1 + draw.normal(0, noise, v.shape)).astype(np.float32) for n, v in START.items()}
        if attack is not None and k < hostile:
            tensors = {n: np.asarray(attack(v, draw), np.float32) for n, v in tensors.items()}
        rows.append(Contribution(f"dev-{k:02d}", 1, 10 + k, START, tensors, PROGRAM.id))
    return rows


def merged(rule: Rule, rows: list[Contribution], **robust: Any) -> MergeResult:
    plan = Plan.of(PROGRAM, TABLE, settings=MergeSettings(robust=RobustSettings(**robust)))
    return merge(rule.create(plan), rows, START)


def error(result: MergeResult) -> float:
    """Root mean square distance of every coordinate from 1, what the honest devices agree on."""
    flat = np.concatenate([v.reshape(-1) for v in result.tensors.values()])
    return float(np.sqrt(np.mean((flat.astype(np.float64) - 1) ** 2)))


@pytest.mark.parametrize("rule", ROBUST, ids=lambda rule: rule.name)
@pytest.mark.parametrize("attack", ATTACKS)
def test_three_hostile_of_ten_do_not_move_the_result(rule: RobustRule, attack: str) -> None:
    rows = updates(10, 3, ATTACKS[attack])
    assert error(merged(rule, rows, attackers=0.3)) < 0.15
    assert error(merged(MEAN, rows)) > 1


@pytest.mark.parametrize("rule", ROBUST, ids=lambda rule: rule.name)
def test_a_majority_of_hostile_updates_wins(rule: RobustRule) -> None:
    assert error(merged(rule, updates(10, 6, ATTACKS["sign flip"]), attackers=0.3)) > 1


def test_clipping_bounds_what_scaling_can_do_and_does_not_stop_a_sign_flip() -> None:
    assert error(merged(NORM_CLIP, updates(10, 3, ATTACKS["scaling"]))) < 0.1
    assert error(merged(NORM_CLIP, updates(10, 3, ATTACKS["sign flip"]))) > 0.5
    fixed = merged(NORM_CLIP, updates(10), clip=1.0)
    norm = np.sqrt(sum(np.sum(v.astype(float) ** 2) for v in fixed.tensors.values()))
    assert norm == pytest.approx(1.0, rel=0.05)
    assert fixed.report["clipped"] == 10


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_the_median_is_that_of_numpy_by_coordinate(count: int) -> None:
    rows = updates(count)
    for name, value in merged(MEDIAN, rows).tensors.items():
        np.testing.assert_allclose(value, np.median([r.tensors[name] for r in rows], axis=0), atol=1e-6)


def test_the_trimmed_mean_leaves_out_the_ends_of_each_coordinate() -> None:
    rows = updates(10)
    for name, value in merged(TRIMMED_MEAN, rows, attackers=0.2).tensors.items():
        middle = np.sort([r.tensors[name] for r in rows], axis=0)[2:8]
        np.testing.assert_allclose(value, middle.mean(axis=0), atol=1e-6)


def test_krum_picks_by_the_definition() -> None:
    rows = updates(9, 2, ATTACKS["noise"])
    flat = np.array([np.concatenate([r.tensors[n].reshape(-1) for n in START]) for r in rows], np.float64)
    distances = ((flat[:, None] - flat[None]) ** 2).sum(axis=2)
    scores = [np.sort(np.delete(row, i))[: 9 - 2 - 2].sum() for i, row in enumerate(distances)]
    result = merged(KRUM, rows, attackers=0.2)
    assert result.report["chosen"] == [rows[int(np.argmin(scores))].device]
    best = sorted(int(i) for i in np.argsort(scores)[:4])
    several = merged(MULTI_KRUM, rows, attackers=0.2, keep=4)
    assert several.report["chosen"] == [rows[i].device for i in best]
    np.testing.assert_allclose(several.tensors["b"], np.mean([rows[i].tensors["b"] for i in best], axis=0), atol=1e-6)


def test_no_point_nearby_has_a_smaller_sum_of_distances_than_the_geometric_median() -> None:
    rows = updates(7, noise=1.0)

    def cost(tensors: Any) -> float:
        return sum(np.sqrt(sum(np.sum((r.tensors[n].astype(float) - tensors[n]) ** 2) for n in START)) for r in rows)

    found = merged(GEOMETRIC_MEDIAN, rows).tensors
    draw = np.random.default_rng(5)
    for size in (1e-2, 1e-1):
        for _ in range(20):
            moved = {n: v + size * draw.normal(0, 1, v.shape) for n, v in found.items()}
            assert cost(found) <= cost(moved)
    assert cost(found) < cost(merged(MEAN, rows).tensors) + 1e-6


def test_too_few_updates_for_krum_are_refused_with_what_to_do() -> None:
    with pytest.raises(
        MergeError, match="krum with 2 hostile updates needs at least 7, found 4: wait for more devices"
    ):
        merged(KRUM, updates(4), attackers=0.4)


@pytest.mark.parametrize("rule", [*ROBUST, NORM_CLIP], ids=lambda rule: rule.name)
def test_devices_that_changed_nothing_leave_the_model_as_it_is(rule: RobustRule) -> None:
    rows = [Contribution(f"dev-{k}", 1, 3, START, START, PROGRAM.id) for k in range(7)]
    for name, value in merged(rule, rows).tensors.items():
        np.testing.assert_array_equal(value, START[name])
