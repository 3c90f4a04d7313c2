"""The state of linear rules: as exact as float32 can show, in bounded memory, and a monoid."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.merge import Contribution
from aggregator.merge.sums import BATCH, BLOCK, Sums


def updates(count: int, size: int, dtype: Any = np.float32, seed: int = 0) -> list[Contribution]:
    draw = np.random.default_rng(seed)
    return [
        Contribution(f"dev-{k:03d}", 1, 1 + 37 * k, {}, {"w": draw.normal(0, 1, size).astype(dtype)})
        for k in range(count)
    ]


def summed(rows: list[Contribution]) -> Sums:
    state = Sums(["w"])
    for row in rows:
        state.add(row)
    return state


def exact_mean(rows: list[Contribution]) -> np.ndarray:
    weights = [row.num_examples for row in rows]
    return np.average([row.tensors["w"].astype(np.float64) for row in rows], axis=0, weights=weights)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3 * BATCH), st.sampled_from([1, 7, BLOCK - 1, BLOCK, 2 * BLOCK + 5]), st.integers(0, 99))
def test_the_mean_of_float32_updates_errs_by_less_than_its_own_rounding(count: int, size: int, seed: int) -> None:
    rows = updates(count, size, seed=seed)
    magnitude = np.max([np.abs(row.tensors["w"]) for row in rows])
    error = np.abs(summed(rows).mean("w") - exact_mean(rows)).max()
    assert error <= magnitude * 2.0**-24


def test_float64_updates_are_summed_in_float64() -> None:
    rows = updates(20, 1000, np.float64)
    np.testing.assert_allclose(summed(rows).mean("w"), exact_mean(rows), rtol=0, atol=1e-15)


def test_a_discount_is_part_of_the_weight() -> None:
    rows = updates(3, 10)
    late = Contribution("dev-999", 1, 50, {}, rows[0].tensors, discount=0.5)
    expected = np.average([row.tensors["w"].astype(float) for row in [*rows, late]], axis=0, weights=[1, 38, 75, 25])
    np.testing.assert_allclose(summed([*rows, late]).mean("w"), expected, atol=1e-7)


def test_weights_beyond_float32_are_not_rounded() -> None:
    rows = [
        Contribution("a", 1, (1 << 24) + 1, {}, {"w": np.ones(4, np.float32)}),
        Contribution("b", 1, 1, {}, {"w": np.full(4, -1.0, np.float32)}),
    ]
    assert summed(rows).mean("w")[0] == (1 << 24) / ((1 << 24) + 2)


def test_the_same_updates_give_the_same_bytes() -> None:
    rows = updates(21, BLOCK + 3)
    assert summed(rows).mean("w").tobytes() == summed(updates(21, BLOCK + 3)).mean("w").tobytes()


def test_memory_is_that_of_a_batch_and_the_sum_however_many_updates_come() -> None:
    size = 200_000

    def stream(count: int) -> int:
        tracemalloc.start()
        draw = np.random.default_rng(0)
        state = Sums(["w"])
        for k in range(count):
            state.add(Contribution(f"dev-{k:03d}", 1, 1, {}, {"w": draw.random(size, np.float32)}))
        state.mean("w")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    few, many = stream(10), stream(60)
    assert many < 1.1 * few
    assert many < 8 * size * 2 + (BATCH + 2) * 4 * size + (1 << 20)


def test_a_tensor_that_only_some_devices_train_is_the_mean_over_those() -> None:
    both = Contribution("a", 1, 1, {}, {"w": np.ones(3, np.float32), "v": np.ones(2, np.float32)})
    one = Contribution("b", 1, 3, {}, {"w": np.full(3, 5.0, np.float32)})
    state = Sums(["w", "v"])
    state.add(both)
    state.add(one)
    assert (state.mean("w")[0], state.mean("v")[0], state.weight("v")) == (4.0, 1.0, 1.0)


@pytest.mark.parametrize("split", [1, 8, 13])
def test_the_sums_of_two_gateways_are_those_of_one(split: int) -> None:
    rows = updates(20, 500)
    both = summed(rows[:split]).combine(summed(rows[split:]))
    np.testing.assert_allclose(both.mean("w"), summed(rows).mean("w"), atol=1e-7)
    assert both.count == 20
