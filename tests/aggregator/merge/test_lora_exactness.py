"""Which rules give the mean of products exactly (methods/lora.md, criterion 1), and the defects seen elsewhere (section 16)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.merge import MergeError, Rule
from aggregator.merge.lora import (
    ALTERNATE,
    FACTOR_MEAN,
    FAIR,
    FEDSVD,
    FREEZE_A,
    PRODUCT_SVD,
    RANK_PARTITION,
    RESIDUAL,
    STACK,
    pairs_of,
)
from tests.aggregator.merge.adapters import Site, target

SHAPES = {"wide": (5, 11), "tall": (9, 4)}
ROOMY = 64  # a side term that holds everything


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / (np.linalg.norm(wanted) or 1.0))


def in_float64(rule: Rule, site: Site, rows: Any, start: Any, layer: str, **settings_: Any) -> np.ndarray:
    """The effective product before the result is rounded to float32."""
    merger: Any = rule.create(site.plan(**settings_))
    state = merger.empty()
    for row in rows:
        state.add(row)
    pair = merger.pairs[layer]
    made = merger._layer(layer, pair, state, state.contributions, start)
    result = rule.layer(made, merger.plan)  # type: ignore[attr-defined]
    value = pair.scale * result.b @ result.a
    if result.base_delta is not None:
        value = value + result.base_delta.x @ result.base_delta.y
    return np.asarray(value)


ranks = st.lists(st.integers(1, 4), min_size=1, max_size=6)


@settings(deadline=None, max_examples=40)
@given(ranks, st.integers(0, 1000), st.sampled_from(["wide", "tall"]))
def test_stack_gives_the_mean_of_products_whatever_the_ranks(mixed: list[int], seed: int, layer: str) -> None:
    site = Site(SHAPES, mixed, seed=seed, side=ROOMY)
    start = {**site.tensors(), **{k: v for r in set(mixed) for k, v in site.tensors(r).items()}}
    rows = [site.update(k, r, site.tensors(r), start, examples=1 + 10**k % 997) for k, r in enumerate(mixed)]
    assert relative(in_float64(STACK, site, rows, start, layer), target(site, rows, layer)) <= 1e-10


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 1000), st.sampled_from(["wide", "tall"]))
def test_residual_gives_the_mean_of_products(rank: int, count: int, seed: int, layer: str) -> None:
    site = Site(SHAPES, [rank], seed=seed, side=ROOMY)
    start = site.tensors()
    rows = [site.update(k, rank, site.tensors(), start, examples=1 + 10**k % 997) for k in range(count)]
    assert relative(in_float64(RESIDUAL, site, rows, start, layer), target(site, rows, layer)) <= 1e-10


@settings(deadline=None, max_examples=40)
@given(ranks, st.integers(0, 1000), st.sampled_from(["wide", "tall"]))
def test_product_svd_is_exact_where_the_rank_suffices(mixed: list[int], seed: int, layer: str) -> None:
    enough = min(SHAPES[layer])
    site = Site(SHAPES, [*mixed, max(enough, sum(mixed))], seed=seed)
    start = site.tensors()
    rows = [site.update(k, r, site.tensors(r), site.tensors(r), examples=1 + 10**k % 997) for k, r in enumerate(mixed)]
    found = in_float64(PRODUCT_SVD, site, rows, start, layer, lora={"mode": "mean"})
    assert relative(found, target(site, rows, layer)) <= 1e-10


@pytest.mark.parametrize("rule", [STACK, RESIDUAL, PRODUCT_SVD], ids=lambda rule: rule.name)
def test_what_is_sent_is_exact_to_float32(rule: Rule) -> None:
    rank = 9 if rule is PRODUCT_SVD else 3
    site = Site(SHAPES, [rank], dtype=np.float32, side=ROOMY)
    start = site.tensors()
    rows = [site.update(k, rank, site.tensors(), start, examples=k + 1) for k in range(3)]
    merged = site.merged(rule, rows, start)
    for layer in SHAPES:
        assert relative(site.product(merged.tensors, layer), target(site, rows, layer)) <= 1e-5
        assert merged.report["layers"][layer]["truncation_error"] <= 1e-7


def test_a_second_round_adds_to_the_side_term_of_the_first() -> None:
    site = Site(SHAPES, [2], dtype=np.float32, side=ROOMY)
    model: Any = site.tensors()
    wanted = {layer: np.zeros(shape) for layer, shape in SHAPES.items()}
    for number in range(3):
        start = model
        rows = [site.update(k, 2, site.tensors(), start) for k in range(3)]
        for layer in SHAPES:
            wanted[layer] = wanted[layer] + target(site, rows, layer)
        model = site.merged(STACK, rows, start, number=number + 1).tensors
    for layer in SHAPES:
        assert relative(site.product(model, layer), wanted[layer]) <= 1e-5


def test_a_side_term_that_is_too_small_says_that_a_rebase_is_due() -> None:
    site = Site(SHAPES, [3], dtype=np.float32, side=2)
    start = site.tensors()
    report = site.merged(STACK, [site.update(k, 3, site.tensors(), start) for k in range(4)], start).report
    assert report["layers"]["wide"]["rebase_due"]
    assert report["layers"]["wide"]["side_error"] > 0.01


@pytest.mark.parametrize("rule", [FREEZE_A, FEDSVD], ids=lambda rule: rule.name)
@pytest.mark.parametrize("count", [1, 5])
def test_one_factor_rules_are_exact_since_the_other_factor_is_shared(rule: Rule, count: int) -> None:
    site = Site(SHAPES, [3], factors="b")
    start = site.tensors()
    rows = [site.update(k, 3, site.tensors(), start, examples=1 + 10**k % 97) for k in range(count)]
    merged = site.merged(rule, rows, start)
    for layer in SHAPES:
        assert relative(site.product(merged.tensors, layer), target(site, rows, layer)) <= 1e-6
    if rule is FEDSVD:
        pair = pairs_of(site.main, site.table)["wide"]
        np.testing.assert_allclose(merged.tensors[pair.a] @ merged.tensors[pair.a].T, np.eye(3), atol=1e-6)
    else:
        np.testing.assert_array_equal(merged.tensors["wide.r3.lora_a"], start["wide.r3.lora_a"])


def test_fedsvd_keeps_the_product_in_float64() -> None:
    from aggregator.merge.lora import _orthonormal

    site = Site(SHAPES, [3], factors="b")
    start = site.tensors()
    pair = pairs_of(site.main, site.table)["wide"]
    b, a = start[pair.b], start[pair.a]
    new_b, new_a = _orthonormal(pair, b, a, start)
    assert relative(new_b @ new_a, b @ a) <= 1e-10


@pytest.mark.parametrize("factors", ["a", "b"])
def test_alternate_is_exact_in_either_round_and_refuses_a_factor_of_another_one(factors: str) -> None:
    site = Site(SHAPES, [2], factors=factors)
    start = site.tensors()
    rows = [site.update(k, 2, site.tensors(), start, examples=k + 1) for k in range(4)]
    merged = site.merged(ALTERNATE, rows, start)
    assert relative(site.product(merged.tensors, "wide"), target(site, rows, "wide")) <= 1e-6
    late = site.update(9, 2, site.tensors(), site.tensors(), staleness=1)
    with pytest.raises(MergeError, match="started 1 rounds ago"):
        ALTERNATE.create(site.plan()).check(late)


def test_rules_for_one_factor_refuse_programs_that_train_both_and_the_other_way_round() -> None:
    both, one = Site(SHAPES, [2]), Site(SHAPES, [2], factors="b")
    with pytest.raises(MergeError, match="factors 'b'"):
        FREEZE_A.create(both.plan())
    with pytest.raises(MergeError, match="trains 'b' of layer"):
        PRODUCT_SVD.create(one.plan())
    with pytest.raises(MergeError, match="factors 'b'"):
        FREEZE_A.create(Site(SHAPES, [2], factors="a").plan())


def test_a_program_that_trains_no_pair_beside_one_that_does_is_legal() -> None:
    """r_k = 0: the device takes part by its head only."""
    site = Site(SHAPES, [2], extra={"head": (3, 2)})
    start = site.tensors()
    head_only, _ = Site({}, [1], extra={"head": (3, 2)}).main, None
    site.programs[0] = head_only
    rows = [site.update(k, 2, site.tensors(), start) for k in range(2)]
    head = np.full((3, 2), 7.0)
    rows.append(site.update(5, 0, {"head": head}, start, examples=20))
    merged = site.merged(PRODUCT_SVD, rows, start)
    assert (
        relative(
            site.product(merged.tensors, "wide"),
            site.product(site.merged(PRODUCT_SVD, rows[:2], start).tensors, "wide"),
        )
        < 1e-9
    )
    expected = (10 * rows[0].tensors["head"] + 10 * rows[1].tensors["head"] + 20 * head) / 40
    np.testing.assert_allclose(merged.tensors["head"], expected, atol=1e-6)


# Section 16: defects seen in public code.

EVERY: list[tuple[Rule, dict[str, Any]]] = [
    (FACTOR_MEAN, {}),
    (PRODUCT_SVD, {}),
    (STACK, {"side": ROOMY}),
    (RESIDUAL, {"side": ROOMY}),
    (FAIR, {}),
    (RANK_PARTITION, {}),
    (FREEZE_A, {"factors": "b"}),
    (ALTERNATE, {"factors": "a"}),
    (FEDSVD, {"factors": "b"}),
]
NAMES = [rule.name for rule, _ in EVERY]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("rule", "more"), EVERY, ids=NAMES)
def test_the_mean_of_constants_one_two_three_is_two(rule: Rule, more: dict[str, Any]) -> None:
    """Of a factor that trains alone, and of the tensors beside the adapter."""
    site = Site({"wide": (5, 11)}, [2], extra={"head": (3,)}, **more)
    start = site.tensors()
    trained = site.main.tensors
    rows = []
    for k, value in enumerate((1.0, 2.0, 3.0)):
        tensors = {
            n: start[n] if n.endswith("lora_a") and "a" in site.main.factors else np.full_like(start[n], value)
            for n in trained
        }
        rows.append(site.update(k, 2, tensors, start))
    merged = site.merged(rule, rows, start)
    np.testing.assert_allclose(merged.tensors["head"], 2.0)
    wanted = target(site, rows, "wide")
    assert relative(site.product(merged.tensors, "wide"), wanted) <= (0.05 if rule is FAIR else 1e-6)


@pytest.mark.parametrize(("rule", "more"), EVERY, ids=NAMES)
def test_identical_clients_give_the_product_of_one(rule: Rule, more: dict[str, Any]) -> None:
    site = Site(SHAPES, [2], **more)
    start = site.tensors()
    one = {name: site.draw.normal(0, 1, start[name].shape) for name in site.main.tensors}
    rows = [site.update(k, 2, one, start, examples=k + 1) for k in range(4)]
    merged = site.merged(rule, rows, start)
    for layer in SHAPES:
        assert relative(site.product(merged.tensors, layer), target(site, rows[:1], layer)) <= (
            0.05 if rule is FAIR else 1e-5
        )


def test_the_scale_is_read_in_one_module_of_the_gateway() -> None:
    from pathlib import Path

    found = {
        path.name
        for path in (Path(__file__).resolve().parents[3] / "aggregator").rglob("*.py")
        if "lora_a" in path.read_text() and ".scale" in path.read_text()
    }
    assert found == {"lora.py"}


def test_mixed_scales_enter_each_product_once() -> None:
    site = Site({"wide": (5, 11)}, [2, 4])
    site.table = {n: (e if ".r2." not in n else type(e)(**{**e.__dict__, "scale": 5.0})) for n, e in site.table.items()}
    start = site.tensors()
    rows = [site.update(k, r, site.tensors(r), site.tensors(r)) for k, r in enumerate((2, 2))]
    found = in_float64(PRODUCT_SVD, site, rows, start, "wide", lora={"mode": "mean"})
    assert relative(found, target(site, rows, "wide")) <= 1e-10
    cut = PRODUCT_SVD.create(site.plan()).cut(start, site.programs[2])
    pair = pairs_of(site.main, site.table)["wide"]
    sliced = pair.scale * start[pair.b][:, :2] @ start[pair.a][:2]
    assert relative(site.product(cut, "wide", 2), sliced) <= 1e-6
