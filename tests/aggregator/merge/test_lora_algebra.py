"""Identities that the rules must keep (methods/lora.md, criterion 3)."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest

from aggregator.merge import Contribution, Rule
from aggregator.merge.lora import FACTOR_MEAN, FAIR, PRODUCT_SVD, RESIDUAL, STACK, compacted, pairs_of
from edge_sdk.tensors import pack
from tests.aggregator.merge.adapters import Site, target
from tests.aggregator.merge.test_lora_exactness import in_float64

SHAPE = {"layer": (7, 12)}


def site_and_rows(count: int = 4, rank: int = 3, **more: Any) -> tuple[Site, Any, list[Contribution]]:
    site = Site(SHAPE, [rank], seed=count, **more)
    start = site.tensors()
    return site, start, [site.update(k, rank, site.tensors(), start, examples=3 + 5 * k) for k in range(count)]


def test_the_naive_error_is_the_covariance_of_drifts() -> None:
    """(E1)"""
    site, start, rows = site_and_rows()
    pair = pairs_of(site.main, site.table)["layer"]
    weights = np.array([row.num_examples for row in rows]) / sum(row.num_examples for row in rows)
    b, a = (np.array([row.tensors[name] for row in rows]) for name in (pair.b, pair.a))
    mean_b, mean_a = np.tensordot(weights, b, 1), np.tensordot(weights, a, 1)
    covariance = pair.scale * sum(w * (x - mean_b) @ (y - mean_a) for w, x, y in zip(weights, b, a, strict=True))
    wanted = target(site, rows, "layer")
    gap = wanted - in_float64(FACTOR_MEAN, site, rows, start, "layer")
    assert np.linalg.norm(gap - covariance) <= 1e-12 * np.linalg.norm(wanted)
    report = site.merged(FACTOR_MEAN, rows, start).report
    assert report["naive_error"] == pytest.approx(np.linalg.norm(covariance) / np.linalg.norm(wanted), rel=1e-9)


@pytest.mark.parametrize("rule", [PRODUCT_SVD, FACTOR_MEAN, FAIR, STACK], ids=lambda rule: rule.name)
def test_any_order_gives_identical_bytes(rule: Rule) -> None:
    site, start, rows = site_and_rows(side=40)
    found = {pack(site.merged(rule, order, start).tensors) for order in permutations(rows)}
    assert len(found) == 1


def test_a_client_in_two_halves_counts_as_one() -> None:
    site, start, rows = site_and_rows()
    whole = rows[-1]
    halves = [
        Contribution(f"half-{i}", 1, whole.num_examples // 2, start, whole.tensors, whole.program, "3") for i in (0, 1)
    ]
    assert whole.num_examples % 2 == 0
    one = in_float64(PRODUCT_SVD, site, rows, start, "layer")
    two = in_float64(PRODUCT_SVD, site, [*rows[:-1], *halves], start, "layer")
    assert np.linalg.norm(one - two) <= 1e-12 * np.linalg.norm(one)


def test_a_change_of_gauge_leaves_product_rules_and_changes_the_factor_mean() -> None:
    """The defect of `factor_mean`: it depends on how a product is written."""
    site, start, rows = site_and_rows(side=40)
    pair = pairs_of(site.main, site.table)["layer"]
    turned = []
    for row in rows:
        gauge = np.eye(3) + 0.5 * site.draw.normal(0, 1, (3, 3))
        tensors = {pair.b: row.tensors[pair.b] @ gauge, pair.a: np.linalg.solve(gauge, row.tensors[pair.a])}
        turned.append(Contribution(row.device, 1, row.num_examples, start, tensors, row.program, "3"))
    for rule in (PRODUCT_SVD, STACK, RESIDUAL):
        one, two = (in_float64(rule, site, found, start, "layer") for found in (rows, turned))
        assert np.linalg.norm(one - two) <= 1e-9 * np.linalg.norm(one)
    one, two = (in_float64(FACTOR_MEAN, site, found, start, "layer") for found in (rows, turned))
    assert np.linalg.norm(one - two) > 0.01 * np.linalg.norm(one)


@pytest.mark.parametrize("mode", ["mean", "change"])
def test_rank_collapse_follows_its_law(mode: str) -> None:
    """Clients that return what they were given: S_i q_i^t in mode "mean", S_i in mode "change"."""
    site = Site(SHAPE, [2, 4, 6])
    u, _ = np.linalg.qr(site.draw.normal(size=(7, 6)))
    v, _ = np.linalg.qr(site.draw.normal(size=(12, 6)))
    values = np.array([8.0, 6, 5, 3, 2, 1])
    pair = pairs_of(site.main, site.table)["layer"]
    root = np.sqrt(values / pair.scale)
    model: Any = {pair.b: u * root, pair.a: root[:, None] * v.T}
    clients = [(2, 30), (4, 50), (6, 20)]
    q = np.array([1, 1, 0.7, 0.7, 0.2, 0.2])
    for number in range(5):
        merger: Any = PRODUCT_SVD.create(site.plan(lora={"mode": mode}, number=number + 1))
        state = merger.empty()
        for k, (rank, examples) in enumerate(clients):
            cut = {
                name: model[big][:, :rank] if big == pair.b else model[big][:rank]
                for name, big in zip(
                    (
                        pairs_of(site.programs[rank], site.table)["layer"].b,
                        pairs_of(site.programs[rank], site.table)["layer"].a,
                    ),
                    (pair.b, pair.a),
                    strict=True,
                )
            }
            state.add(site.update(k, rank, cut, cut, examples=examples))
        layer = merger._layer("layer", pair, state, state.contributions, model)
        result = PRODUCT_SVD.layer(layer, merger.plan)
        model = {pair.b: result.b, pair.a: result.a}
    left = np.linalg.svd(pair.scale * model[pair.b] @ model[pair.a], compute_uv=False)[:6]
    expected = values * q**5 if mode == "mean" else values
    np.testing.assert_allclose(left, np.sort(expected)[::-1], rtol=1e-9)


def test_mode_auto_is_mean_where_both_agree_and_change_where_they_do_not() -> None:
    site, start, rows = site_and_rows()
    fresh = [Contribution(r.device, 1, r.num_examples, start, r.tensors, r.program, "now") for r in rows]
    both = [site.merged(PRODUCT_SVD, fresh, start, lora={"mode": mode}).tensors for mode in ("auto", "mean", "change")]
    assert pack(both[0]) == pack(both[1]) == pack(both[2])
    late = [
        *fresh[:-1],
        Contribution(rows[-1].device, 1, 8, site.tensors(), rows[-1].tensors, rows[-1].program, "then", 1, 0.5**0.5),
    ]
    auto, mean, change = (
        site.product(site.merged(PRODUCT_SVD, late, start, lora={"mode": mode}).tensors, "layer")
        for mode in ("auto", "mean", "change")
    )
    np.testing.assert_array_equal(auto, change)
    assert np.linalg.norm(auto - mean) > 0.01


def test_a_late_update_adds_its_change_and_not_its_start() -> None:
    """Section 9: D + sum p g (P - start), here with room for the exact result."""
    site = Site(SHAPE, [7])
    start = site.tensors()
    old = site.tensors()
    moved = {name: value + 0.1 * site.draw.normal(0, 1, value.shape) for name, value in old.items()}
    fresh = site.update(0, 7, site.tensors(), start, examples=30)
    late = site.update(1, 7, moved, old, examples=10, start_digest="old", staleness=2, discount=3**-0.5)
    found = in_float64(PRODUCT_SVD, site, [fresh, late], start, "layer")
    d, p1 = site.product(start, "layer"), target(site, [fresh], "layer")
    wanted = d + 0.75 * (p1 - d) + 0.25 * 3**-0.5 * (site.product(moved, "layer") - site.product(old, "layer"))
    assert np.linalg.norm(found - wanted) <= 1e-9 * np.linalg.norm(wanted)


def test_gateways_under_a_gateway_may_compact_without_loss() -> None:
    site, _, rows = site_and_rows(9)
    pair = pairs_of(site.main, site.table)["layer"]
    total = sum(row.num_examples for row in rows)
    blocks = [(row.num_examples / total * pair.scale * row.tensors[pair.b], row.tensors[pair.a]) for row in rows]
    below = [compacted(blocks[:4]), compacted(blocks[4:])]
    on_the_wire = [(x.astype(np.float32).astype(float), y.astype(np.float32).astype(float)) for x, y in below]
    x, y = compacted(on_the_wire)
    wanted = target(site, rows, "layer")
    assert x.shape[1] <= 7
    assert np.linalg.norm(x @ y - wanted) <= 1e-6 * np.linalg.norm(wanted)
