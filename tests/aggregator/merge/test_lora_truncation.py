"""The cut of `product_svd` is the best of its rank, and is reported exactly (methods/lora.md, criterion 2)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.merge.lora import FACTOR_MEAN, FAIR, PRODUCT_SVD, RANK_PARTITION, REBASE_DUE
from tests.aggregator.merge.adapters import Site, target

SHAPE = {"layer": (9, 13)}


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(2, 7), st.integers(0, 999))
def test_the_error_is_the_tail_and_no_other_rule_of_the_rank_is_better(rank: int, count: int, seed: int) -> None:
    site = Site(SHAPE, [rank], seed=seed)
    start = site.tensors()
    rows = [site.update(k, rank, site.tensors(), start, examples=1 + 7 * k) for k in range(count)]
    wanted = target(site, rows, "layer")
    values = np.linalg.svd(wanted, compute_uv=False)
    norm, tail = np.linalg.norm(wanted), np.sqrt(np.sum(values[rank:] ** 2))
    result = site.merged(PRODUCT_SVD, rows, start)
    error = np.linalg.norm(site.product(result.tensors, "layer") - wanted)
    assert error == pytest.approx(tail, abs=1e-6 * norm)  # what is sent is float32
    assert result.report["layers"]["layer"]["truncation_error"] * norm == pytest.approx(tail, abs=1e-8 * norm)
    for other in (FACTOR_MEAN, FAIR, RANK_PARTITION):
        sent = site.merged(other, rows, start)
        missed = np.linalg.norm(site.product(sent.tensors, "layer") - wanted)
        assert missed >= tail - 1e-6 * norm
        assert sent.report["layers"]["layer"]["truncation_error"] * norm == pytest.approx(missed, abs=1e-6 * norm)


@pytest.mark.parametrize("balance", ["even", "unit_a"])
def test_both_balances_are_the_same_function(balance: str) -> None:
    site = Site(SHAPE, [3])
    start = site.tensors()
    rows = [site.update(k, 3, site.tensors(), start) for k in range(3)]
    even = site.merged(PRODUCT_SVD, rows, start)
    other = site.merged(PRODUCT_SVD, rows, start, lora={"balance": balance})
    np.testing.assert_allclose(site.product(other.tensors, "layer"), site.product(even.tensors, "layer"), atol=1e-5)
    a = other.tensors["layer.r3.lora_a"]
    if balance == "unit_a":
        np.testing.assert_allclose(a @ a.T, np.eye(3), atol=1e-6)


def test_energy_picks_the_smallest_rank_that_keeps_it() -> None:
    site = Site(SHAPE, [5])
    start = site.tensors()
    rows = [site.update(k, 5, site.tensors(), start) for k in range(4)]
    squares = np.linalg.svd(target(site, rows, "layer"), compute_uv=False) ** 2
    wanted = 1 + int(np.argmax(np.cumsum(squares) >= 0.6 * squares.sum()))
    report = site.merged(PRODUCT_SVD, rows, start, lora={"energy": 0.6}).report
    assert report["layers"]["layer"]["rank"] == wanted < 5


def test_the_tail_may_go_into_the_side_term() -> None:
    site = Site(SHAPE, [2], side=20, dtype=np.float32)
    start = site.tensors()
    rows = [site.update(k, 2, site.tensors(), start) for k in range(5)]
    result = site.merged(PRODUCT_SVD, rows, start, lora={"residual": "base"})
    wanted = target(site, rows, "layer")
    assert np.linalg.norm(site.product(result.tensors, "layer") - wanted) <= 1e-5 * np.linalg.norm(wanted)
    assert result.report["layers"]["layer"]["side_error"] < REBASE_DUE


def test_the_report_has_energy_rank_and_drift() -> None:
    site = Site(SHAPE, [3])
    start = site.tensors()
    rows = [site.update(k, 3, site.tensors(), start, examples=k + 1) for k in range(4)]
    report = site.merged(PRODUCT_SVD, rows, start).report["layers"]["layer"]
    wanted = target(site, rows, "layer")
    energy = np.linalg.svd(wanted, compute_uv=False) ** 2
    energy /= energy.sum()
    np.testing.assert_allclose(report["energy"], energy[:6], atol=1e-9)
    alive = energy[energy > 0]
    assert report["effective_rank"] == pytest.approx(np.exp(-np.sum(alive * np.log(alive))))
    assert report["tail_energy"] == pytest.approx(energy[3:].sum())
    old = site.product(start, "layer")
    drifts = [target(site, [row], "layer") - old for row in rows]
    change = wanted - old
    cosines = [np.sum(d * change) / np.linalg.norm(d) / np.linalg.norm(change) for d in drifts]
    assert report["drift_cosine"]["min"] == pytest.approx(min(cosines), abs=1e-9)
    assert report["drift_cosine"]["median"] == pytest.approx(np.median(cosines), abs=1e-9)
