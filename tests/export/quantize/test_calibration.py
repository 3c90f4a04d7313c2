"""Ranges merge exactly, in any order and tree; a dim client is repaired by the union, an inflated bound is cut (20)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.ranges import Bounds, RangeError, RangeStats, merged, scale_of
from export.quantize.calibration import calibrate
from export.quantize.ptq import stripped, to_integers
from tests.export.quantize.nets import accuracy, digits, graph_of, trained


@pytest.fixture(scope="module")
def model() -> ir.Model:
    return graph_of(trained(), digits().x)


def test_clients_together_give_exactly_the_ranges_of_the_pooled_data(model: ir.Model) -> None:
    x = digits().x[:120]
    pooled = calibrate(model, x).finish()
    parts = [calibrate(model, x[i::3], f"client{i}") for i in range(3)]
    assert parts[0].combine(parts[1]).combine(parts[2]).finish() == pooled
    assert parts[2].combine(parts[0].combine(parts[1])).finish() == pooled


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from("ab"), st.floats(-9, 9, width=32)), min_size=1),
    st.randoms(use_true_random=False),
)
def test_any_order_and_tree_gives_the_same(seen: list[tuple[int, str, float]], random) -> None:
    parts = [RangeStats().add(f"c{client}", name, np.array([value], np.float32)) for client, name, value in seen]
    expected = merged(parts)
    waiting = list(parts)
    while len(waiting) > 1:
        one, other = (waiting.pop(random.randrange(len(waiting))) for _ in range(2))
        waiting.append(one.combine(other))
    assert waiting[0] == expected
    everything = [value for _, name, value in seen if name == seen[0][1]]
    low, high = expected.finish(outlier=float("inf"))[seen[0][1]]
    assert (low, high) == (np.float32(min(everything)), np.float32(max(everything)))


def test_the_scales_of_a_dim_client_cost_accuracy_and_the_union_repairs_them(model: ir.Model) -> None:
    x = digits().x
    whole, dim = calibrate(model, x[:100], "bright"), calibrate(model, 0.15 * x[100:200], "dim")
    lone = accuracy(stripped(to_integers(model, dim.finish())))
    together = whole.combine(dim)
    repaired = accuracy(stripped(to_integers(model, together.finish())))
    good = accuracy(stripped(to_integers(model, whole.finish())))
    assert lone < good - 0.03
    assert abs(repaired - good) <= 0.01
    assert set(together.dim_clients()) == {"dim"}


def test_one_client_cannot_inflate_a_range_beyond_four_times_the_median() -> None:
    honest = [RangeStats({f"c{i}": {"t": Bounds(9, -1.0, 2.0 + i / 10)}}) for i in range(4)]
    hostile = RangeStats({"evil": {"t": Bounds(9, -1e6, 1e6)}})
    low, high = merged([*honest, hostile]).finish()["t"]
    assert (low, high) == (pytest.approx(-4.0), pytest.approx(4 * 2.2))
    assert merged(honest).finish()["t"] == (-1.0, pytest.approx(2.3))


@pytest.mark.parametrize("bounds", [Bounds(1, np.nan, 1.0), Bounds(1, -np.inf, 1.0), Bounds(1, 2.0, 1.0)])
def test_bounds_that_are_none_are_refused_naming_client_and_tensor(bounds: Bounds) -> None:
    with pytest.raises(RangeError, match=r"client 'c7': tensor 'relu'"):
        RangeStats().combine(RangeStats({"c7": {"relu": bounds}}))


@given(st.floats(-1e3, 1e3, width=32), st.floats(-1e3, 1e3, width=32))
def test_a_range_holds_zero_exactly_and_its_ends_within_a_step(one: float, other: float) -> None:
    low, high = min(one, other, 0.0), max(one, other, 0.0)
    scale, zero_point = scale_of(low, high)
    assert 0 <= zero_point <= 255
    if high - low > 1e-30:
        assert abs((0 - zero_point) * scale - low) <= scale
        assert abs((255 - zero_point) * scale - high) <= scale
