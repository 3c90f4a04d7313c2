"""The merge rules: exact where they claim to be, and the same bytes in whatever order updates came."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.merge import Contribution, MergeError, State, empty, merger_for
from aggregator.merge.low_rank import svd_of_product
from edge_sdk.bundle import Bundle
from edge_sdk.tensors import pack
from tests.tiny_bundle import HEAD, LORA, SCALE, tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    path: Path = tmp_path_factory.mktemp("merge") / "tiny.bundle"
    with Bundle.open(tiny_bundle(path, features=12)) as opened:
        yield opened


def merger(bundle: Bundle, rule: str, program: str = LORA) -> Any:
    return merger_for(rule, bundle.program(program), bundle.tensors, None, 0, 1)


def contributions(bundle: Bundle, count: int, program: str = LORA, spread: float = 0.3) -> list[Contribution]:
    start = bundle.initial(bundle.program(program))
    draw = np.random.default_rng(count)
    return [
        Contribution(
            f"dev-{k}",
            k + 1,
            10 + 7 * k,
            start,
            {n: v + draw.normal(0, spread, v.shape).astype(np.float32) for n, v in start.items()},
        )
        for k in range(count)
    ]


def fold(rows: list[Contribution]) -> State:
    state = empty()
    for row in rows:
        state = state.add(row)
    return state


def mean_product(rows: list[Contribution]) -> np.ndarray:
    total = sum(row.num_examples for row in rows)
    return sum(
        row.num_examples / total * SCALE * row.tensors["layer.lora_b"].astype(float) @ row.tensors["layer.lora_a"]
        for row in rows
    )


def product(tensors: dict[str, Any]) -> np.ndarray:
    return SCALE * tensors["layer.lora_b"].astype(float) @ tensors["layer.lora_a"]


def test_the_mean_weighs_by_examples(bundle: Bundle) -> None:
    rows = contributions(bundle, 4, HEAD)
    merged = merger(bundle, "mean", HEAD).finish(fold(rows), rows[0].start).tensors
    for name in ("weight", "bias"):
        expected = np.average([row.tensors[name] for row in rows], axis=0, weights=[row.num_examples for row in rows])
        np.testing.assert_allclose(merged[name], expected, atol=1e-6)


def test_the_cut_is_the_best_of_its_rank(bundle: Bundle) -> None:
    rows = contributions(bundle, 5)
    result = merger(bundle, "product_svd").finish(fold(rows), rows[0].start)
    target = mean_product(rows)
    u, s, v = np.linalg.svd(target)
    best = u[:, :2] * s[:2] @ v[:2]
    np.testing.assert_allclose(product(result.tensors), best, atol=1e-5)
    assert result.report["truncation_error"] == pytest.approx(s[2] / np.linalg.norm(target), rel=1e-5)


def test_one_client_is_returned_exactly(bundle: Bundle) -> None:
    rows = contributions(bundle, 1)
    merged = merger(bundle, "product_svd").finish(fold(rows), rows[0].start).tensors
    np.testing.assert_allclose(product(merged), mean_product(rows), atol=1e-5)


def test_the_report_tells_how_far_off_the_mean_of_factors_would_be(bundle: Bundle) -> None:
    rows = contributions(bundle, 5)
    report = merger(bundle, "product_svd").finish(fold(rows), rows[0].start).report
    mean = merger(bundle, "mean").finish(fold(rows), rows[0].start).tensors
    target = mean_product(rows)
    expected = np.linalg.norm(target - product(mean)) / np.linalg.norm(target)
    assert report["naive_error"] == pytest.approx(expected, rel=1e-4)
    assert report["truncation_error"] < report["naive_error"]


def test_the_singular_values_are_shared_evenly(bundle: Bundle) -> None:
    rows = contributions(bundle, 3)
    merged = merger(bundle, "product_svd").finish(fold(rows), rows[0].start).tensors
    columns = np.linalg.norm(merged["layer.lora_b"], axis=0)
    np.testing.assert_allclose(columns, np.linalg.norm(merged["layer.lora_a"], axis=1), rtol=1e-4)


def test_a_dead_direction_gets_a_fresh_row_and_can_learn(bundle: Bundle) -> None:
    row = contributions(bundle, 1)[0]
    tensors = {**row.tensors, "layer.lora_b": row.tensors["layer.lora_b"].copy()}
    tensors["layer.lora_b"][:, 1] = 0
    only = Contribution("dev-0", 1, 5, row.start, tensors)
    merged = merger(bundle, "product_svd").finish(fold([only]), row.start).tensors
    np.testing.assert_array_equal(merged["layer.lora_b"][:, 1], 0)
    assert np.abs(merged["layer.lora_a"][1]).max() > 0
    np.testing.assert_allclose(product(merged), mean_product([only]), atol=1e-5)


def test_updates_that_changed_nothing_give_the_start_back(bundle: Bundle) -> None:
    start = bundle.initial(bundle.program(LORA))
    rows = [Contribution(f"dev-{k}", 1, 5, start, start) for k in range(3)]
    merged = merger(bundle, "product_svd").finish(fold(rows), start).tensors
    for name, value in start.items():
        np.testing.assert_array_equal(merged[name], value)


@pytest.mark.parametrize("rule", ["mean", "product_svd"])
def test_the_order_of_arrival_changes_no_byte(bundle: Bundle, rule: str) -> None:
    rows = contributions(bundle, 6)
    rule_of = merger(bundle, rule)
    expected = pack(rule_of.finish(fold(rows), rows[0].start).tensors)
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        assert pack(rule_of.finish(fold(rows), rows[0].start).tensors) == expected
        assert pack(rule_of.finish(fold(rows[:2]).combine(fold(rows[2:])), rows[0].start).tensors) == expected


def test_an_update_is_never_counted_twice(bundle: Bundle) -> None:
    rows = contributions(bundle, 2)
    with pytest.raises(MergeError, match="update 1 of device 'dev-0' would be counted twice"):
        fold(rows).combine(fold(rows[:1]))


def test_nothing_cannot_be_merged(bundle: Bundle) -> None:
    with pytest.raises(MergeError, match="nothing to merge"):
        merger(bundle, "mean").finish(empty(), {})


def test_a_rule_for_pairs_refuses_a_program_without(bundle: Bundle) -> None:
    with pytest.raises(MergeError, match="has none: use rule"):
        merger(bundle, "product_svd", HEAD)


def test_an_unknown_rule_is_refused_with_the_names_that_exist(bundle: Bundle) -> None:
    with pytest.raises(MergeError, match="'median'; there are mean, product_svd"):
        merger(bundle, "median")


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 20), st.integers(0, 10_000))
def test_both_forms_of_the_svd_agree_with_the_dense_one(m: int, n: int, inner: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    x, y = draw.normal(size=(m, inner)), draw.normal(size=(inner, n))
    svd = svd_of_product(x, y)
    np.testing.assert_allclose(svd.left * svd.values @ svd.right, x @ y, atol=1e-9)
    dense = np.linalg.svd(x @ y, compute_uv=False)
    size = min(len(dense), len(svd.values))
    np.testing.assert_allclose(svd.values[:size], dense[:size], atol=1e-9)
