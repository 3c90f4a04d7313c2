"""Draws: the same everywhere, evenly spread."""

from __future__ import annotations

import numpy as np
import pytest

from edge_sdk.draws import Draws


def test_the_stream_of_a_seed_and_purpose_is_fixed_for_ever() -> None:
    draws = Draws(7, "order")
    assert draws.permutation(np.arange(8)).tolist() == [3, 7, 1, 0, 5, 6, 4, 2]
    assert draws.uniform((2,)).tolist() == pytest.approx([0.19595206, 0.85574073], abs=1e-8)


def test_purposes_and_calls_differ() -> None:
    first, second = Draws(7, "order"), Draws(7, "rounding")
    assert not np.array_equal(first.uniform((4,)), second.uniform((4,)))
    assert not np.array_equal(first.uniform((4,)), first.uniform((4,)))


def test_numbers_are_uniform_in_0_to_1() -> None:
    values = Draws(1, "x").uniform((200, 500))
    assert values.dtype == np.float32
    assert 0.0 <= values.min() < 1e-4
    assert 1 - 1e-4 < values.max() < 1.0
    counts, _ = np.histogram(values, 20, (0, 1))
    assert np.abs(counts / 5000 - 1).max() < 0.06  # 4 standard deviations of 5,000 expected per bin


def test_a_permutation_holds_every_value_once() -> None:
    values = np.arange(10, 60)
    assert sorted(Draws(3, "x").permutation(values)) == values.tolist()


def test_choices_follow_their_weights() -> None:
    draws = Draws(5, "x")
    counts = np.bincount([draws.choice([0.7, 0.0, 0.3]) for _ in range(4000)], minlength=3)
    assert counts[1] == 0
    assert counts[0] / 4000 == pytest.approx(0.7, abs=0.03)
