"""The merge rules: exact where they claim to be, and the same bytes in whatever order updates came."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.merge import Contribution, MergeError, MergeResult, Plan, Rule, merge, rule_named
from aggregator.merge.lora import PRODUCT_SVD
from aggregator.merge.low_rank import svd_of_product
from aggregator.merge.mean import MEAN
from edge_sdk.bundle import Bundle
from tests.tiny_bundle import HEAD, LORA, SCALE, tiny_bundle

CHECKOUT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    path: Path = tmp_path_factory.mktemp("merge") / "tiny.bundle"
    with Bundle.open(tiny_bundle(path, features=12)) as opened:
        yield opened


def merged(bundle: Bundle, rule: Rule, rows: list[Contribution], program: str = LORA) -> MergeResult:
    plan = Plan.of(bundle.program(program), bundle.tensors)
    return merge(rule.create(plan), rows, rows[0].start)


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
            program,
        )
        for k in range(count)
    ]


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
    found = merged(bundle, MEAN, rows, HEAD).tensors
    for name in ("weight", "bias"):
        expected = np.average([row.tensors[name] for row in rows], axis=0, weights=[row.num_examples for row in rows])
        np.testing.assert_allclose(found[name], expected, atol=1e-6)


def test_the_cut_is_the_best_of_its_rank(bundle: Bundle) -> None:
    rows = contributions(bundle, 5)
    result = merged(bundle, PRODUCT_SVD, rows)
    target = mean_product(rows)
    u, s, v = np.linalg.svd(target)
    best = u[:, :2] * s[:2] @ v[:2]
    np.testing.assert_allclose(product(result.tensors), best, atol=1e-5)
    assert result.report["truncation_error"] == pytest.approx(s[2] / np.linalg.norm(target), rel=1e-5)


def test_one_client_is_returned_exactly(bundle: Bundle) -> None:
    rows = contributions(bundle, 1)
    found = merged(bundle, PRODUCT_SVD, rows).tensors
    np.testing.assert_allclose(product(found), mean_product(rows), atol=1e-5)


def test_the_report_tells_how_far_off_the_mean_of_factors_would_be(bundle: Bundle) -> None:
    rows = contributions(bundle, 5)
    report = merged(bundle, PRODUCT_SVD, rows).report
    mean = merged(bundle, MEAN, rows).tensors
    target = mean_product(rows)
    expected = np.linalg.norm(target - product(mean)) / np.linalg.norm(target)
    assert report["naive_error"] == pytest.approx(expected, rel=1e-4)
    assert report["truncation_error"] < report["naive_error"]


def test_the_singular_values_are_shared_evenly(bundle: Bundle) -> None:
    rows = contributions(bundle, 3)
    found = merged(bundle, PRODUCT_SVD, rows).tensors
    columns = np.linalg.norm(found["layer.lora_b"], axis=0)
    np.testing.assert_allclose(columns, np.linalg.norm(found["layer.lora_a"], axis=1), rtol=1e-4)


def test_a_dead_direction_gets_a_fresh_row_and_can_learn(bundle: Bundle) -> None:
    row = contributions(bundle, 1)[0]
    tensors = {**row.tensors, "layer.lora_b": row.tensors["layer.lora_b"].copy()}
    tensors["layer.lora_b"][:, 1] = 0
    only = Contribution("dev-0", 1, 5, row.start, tensors, LORA)
    found = merged(bundle, PRODUCT_SVD, [only]).tensors
    np.testing.assert_array_equal(found["layer.lora_b"][:, 1], 0)
    assert np.abs(found["layer.lora_a"][1]).max() > 0
    np.testing.assert_allclose(product(found), mean_product([only]), atol=1e-5)


def test_updates_that_changed_nothing_give_the_start_back(bundle: Bundle) -> None:
    start = bundle.initial(bundle.program(LORA))
    rows = [Contribution(f"dev-{k}", 1, 5, start, start, LORA) for k in range(3)]
    found = merged(bundle, PRODUCT_SVD, rows).tensors
    for name, value in start.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("rule", [MEAN, PRODUCT_SVD], ids=["mean", "product_svd"])
def test_updates_out_of_order_are_refused_rather_than_summed_in_another_order(bundle: Bundle, rule: Rule) -> None:
    with pytest.raises(MergeError, match="folded in sorted order"):
        merged(bundle, rule, contributions(bundle, 3)[::-1])


@pytest.mark.parametrize("rule", [MEAN, PRODUCT_SVD], ids=["mean", "product_svd"])
def test_an_update_is_never_counted_twice(bundle: Bundle, rule: Rule) -> None:
    rows = contributions(bundle, 2)
    with pytest.raises(MergeError, match="update 1 of device 'dev-0' would be counted twice"):
        merged(bundle, rule, [rows[0], *rows])
    made = rule.create(Plan.of(bundle.program(LORA), bundle.tensors))
    states = []
    for part in (rows, rows[:1]):
        states.append(made.empty())
        for row in part:
            states[-1].add(row)
    with pytest.raises(MergeError, match="update 1 of device 'dev-0' would be counted twice"):
        states[0].combine(states[1])


@pytest.mark.parametrize("rule", [MEAN, PRODUCT_SVD], ids=["mean", "product_svd"])
def test_the_states_of_two_gateways_combine(bundle: Bundle, rule: Rule) -> None:
    rows = contributions(bundle, 12)
    made = rule.create(Plan.of(bundle.program(LORA), bundle.tensors))
    states = [made.empty(), made.empty()]
    for index, row in enumerate(sorted(rows, key=lambda r: r.key)):
        states[index % 2].add(row)
    both = made.finish(states[0].combine(states[1]), rows[0].start).tensors
    alone = merged(bundle, rule, sorted(rows, key=lambda r: r.key)).tensors
    np.testing.assert_allclose(product(both), product(alone), atol=1e-6)


@pytest.mark.parametrize("rule", [MEAN, PRODUCT_SVD], ids=["mean", "product_svd"])
def test_nothing_cannot_be_merged(bundle: Bundle, rule: Rule) -> None:
    with pytest.raises(MergeError, match="nothing to merge"):
        merge(rule.create(Plan.of(bundle.program(LORA), bundle.tensors)), [], {})


def test_a_rule_for_pairs_refuses_a_program_without(bundle: Bundle) -> None:
    with pytest.raises(MergeError, match="has none: use rule"):
        PRODUCT_SVD.create(Plan.of(bundle.program(HEAD), bundle.tensors))


def test_an_unknown_rule_is_refused_with_the_names_that_exist(bundle: Bundle) -> None:
    with pytest.raises(MergeError, match="'middle'; there are .*product_svd"):
        rule_named("middle", bundle.program(LORA), bundle.tensors)


def test_without_a_name_pairs_merge_by_their_product_and_all_else_by_the_mean(bundle: Bundle) -> None:
    assert rule_named(None, bundle.program(LORA), bundle.tensors) is PRODUCT_SVD
    assert rule_named(None, bundle.program(HEAD), bundle.tensors) is MEAN


def test_every_entry_point_of_the_project_is_a_rule() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    for name, target in project["entry-points"]["edgewise.mergers"].items():
        module, attribute = target.split(":")
        rule = getattr(import_module(module), attribute)
        assert callable(rule.create), name
        assert isinstance(rule.uses, frozenset), name


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
