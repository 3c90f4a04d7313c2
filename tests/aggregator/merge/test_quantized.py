"""Integers are dequantized with their own scales, and then averaged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.merge import Contribution, MergeError
from aggregator.merge.quantized import Quantized, dequantize, dequantized, levels, quantize
from aggregator.merge.sums import Sums

SHAPE = (6, 5)


def client(index: int, value: np.ndarray, bits: int, examples: int) -> Contribution:
    tensors = dequantized({"w": quantize(value, bits)}, {"w": SHAPE}, bits=bits, base="b", expected="b")
    return Contribution(f"dev-{index}", 1, examples, {}, tensors)


def mean(parts: list[Contribution]) -> np.ndarray:
    state = Sums(["w"])
    for part in sorted(parts, key=lambda found: found.key):
        state.add(part)
    return state.mean("w")


@given(st.integers(0, 10_000), st.sampled_from([2, 3, 4, 8]))
def test_the_error_is_at_most_half_a_step_with_scales_a_hundred_apart(seed: int, bits: int) -> None:
    draw = np.random.default_rng(seed)
    values = [draw.normal(size=SHAPE).astype(np.float32) * size for size in (0.01, 1.0)]
    examples = [int(count) for count in draw.integers(1, 100, 2)]
    share = np.array(examples) / sum(examples)
    found = mean([client(i, v, bits, n) for i, (v, n) in enumerate(zip(values, examples, strict=True))])
    exact = sum(p * v.astype(np.float64) for p, v in zip(share, values, strict=True))
    steps = sum(p * quantize(v, bits).scales[:, None] for p, v in zip(share, values, strict=True))
    assert (np.abs(found - exact) <= 0.5 * steps * (1 + 1e-5)).all()


def test_averaging_integers_would_break_that_bound() -> None:
    """What the module does not offer: with scales a hundred apart the mean of codes is off by far more than a step."""
    draw = np.random.default_rng(0)
    values = [draw.normal(size=SHAPE).astype(np.float32) * size for size in (0.01, 1.0)]
    parts = [quantize(value, 4) for value in values]
    naive = np.mean([part.codes for part in parts], axis=0) * np.mean([part.scales for part in parts], axis=0)[:, None]
    steps = 0.5 * sum(part.scales[:, None] for part in parts)
    assert (np.abs(naive - (values[0] + values[1]) / 2) > 0.5 * steps).any()


def test_any_order_gives_the_same_bytes_and_partial_states_combine() -> None:
    draw = np.random.default_rng(3)
    parts = [client(i, draw.normal(size=SHAPE).astype(np.float32), 3, int(draw.integers(1, 50))) for i in range(20)]
    whole = mean(parts)
    assert mean([parts[i] for i in draw.permutation(20)]).tobytes() == whole.tobytes()
    left, right = Sums(["w"]), Sums(["w"])
    ordered = sorted(parts, key=lambda found: found.key)
    for state, some in ((left, ordered[::2]), (right, ordered[1::2])):
        for part in some:
            state.add(part)
    assert np.allclose(left.combine(right).mean("w"), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_symmetric_and_the_largest_weight_is_kept(bits: int) -> None:
    value = np.random.default_rng(bits).normal(size=(4, 3, 2)).astype(np.float32)
    found = quantize(value, bits)
    assert found.codes.min() >= -levels(bits)
    assert np.abs(dequantize(found)).reshape(4, -1).max(axis=1) == pytest.approx(np.abs(value).reshape(4, -1).max(1))
    assert not dequantize(quantize(np.zeros((2, 3), np.float32), bits)).any()


GOOD = quantize(np.ones(SHAPE, np.float32), 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": None}, "scales are NoneType, expected float32: integers mean nothing without scales"),
        ({"scales": np.ones(5, np.float32)}, r"scales of shape \[5\] for codes of shape \[6, 5\]"),
        ({"scales": np.zeros(6, np.float32)}, "not above 0"),
        ({"scales": np.full(6, np.inf, np.float32)}, "not finite"),
        ({"codes": np.full(SHAPE, 8, np.int8)}, "a code of 8, at most 7 with 4 bits"),
        ({"codes": np.full(SHAPE, -128, np.int8)}, "a code of 128, at most 7"),
        ({"codes": np.ones(SHAPE, np.int32)}, "codes are int32, expected int8"),
        ({"bits": 1}, "weights of 1 bits, expected 2 to 8"),
    ],
)
def test_integers_that_are_not_what_they_claim_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        replace(GOOD, **change)


def test_integers_without_scales_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="scales"):
        Quantized(codes=np.ones(SHAPE, np.int8), bits=4)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 3}, "tensor 'w' has 4 bits, its program 3"),
        ({"base": "other"}, "trained on base 'other', expected 'b'"),
        ({"shapes": {"w": (5, 6)}}, r"tensor 'w' has shape \[6, 5\], expected \[5, 6\]"),
        ({"shapes": {}}, "expected no such tensor"),
        ({"tensors": {"w": GOOD.codes}}, "tensor 'w' is int8, expected float32 or integers with scales"),
    ],
)
def test_an_update_of_another_program_or_base_is_refused(given: dict[str, Any], message: str) -> None:
    usual: dict[str, Any] = {"tensors": {"w": GOOD}, "shapes": {"w": SHAPE}, "bits": 4, "base": "b", "expected": "b"}
    dequantized(**usual)
    with pytest.raises(MergeError, match=message):
        dequantized(**{**usual, **given})
