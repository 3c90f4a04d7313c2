"""The coarse step is the optimum of what it says it optimises, and says why for each device."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.assign.precision_coarse import Choice, Profile, Reason, allocate, round_seconds, values
from aggregator.assign.settings import PrecisionSettings

USUAL = PrecisionSettings()
PLANT = {
    "a": Profile(10.0, 25.0, 0.1, 100, skew=0.2, drop=0.05, steps=20),
    "b": Profile(20.0, 50.0, 0.1, 100, drop=0.05, steps=20),
    "c": Profile(24.0, 30.0, 0.1, 200, drop=0.04, steps=20),
    "d": Profile(30.0, 75.0, 0.1, 100, drop=0.05, steps=20),
    "e": Profile(5.0, 6.0, 0.1, 50, drop=0.001, steps=20),
    "f": Profile(5.0, 6.0, 0.1, 50, drop=0.05, steps=20, fits=False),
    "g": Profile(math.nan, 6.0, 0.1, 50, drop=0.05),
}


def test_a_plant_of_seven_devices() -> None:
    found = allocate(PLANT, USUAL)
    assert found.least_seconds == pytest.approx(0.7)  # d, 20 steps of 30 ms and 0.1 s
    assert found.budget_seconds == pytest.approx(0.84)
    assert [(round(tau, 3), device) for tau, device in found.breakpoints] == [
        (0.22, "e"),
        (0.6, "a"),
        (0.7, "c"),
        (1.1, "b"),
        (1.6, "d"),
    ]
    assert {device: verdict.reason for device, verdict in found.verdicts.items()} == {
        "a": Reason.FREE,
        "b": Reason.TOO_SLOW,
        "c": Reason.FREE,
        "d": Reason.TOO_SLOW,
        "e": Reason.NO_DROP,
        "f": Reason.DOES_NOT_FIT,
        "g": Reason.UNPROFILED,
    }
    assert [device for device, choice in found.choices.items() if choice is Choice.QAT] == ["a", "c"]
    assert found.seconds == pytest.approx(0.7)
    assert str(found.verdicts["b"]) == "too-slow: a round would take it 1.1 s, at most 0.84 s"
    wider = allocate(PLANT, replace(USUAL, time_factor=1.6))
    assert wider.verdicts["b"].reason is Reason.WITHIN_BUDGET
    assert wider.seconds == pytest.approx(1.1)


@pytest.mark.parametrize("seed", range(200))
def test_no_allocation_within_the_budget_is_worth_more(seed: int) -> None:
    draw = np.random.default_rng(seed)
    plant = {f"dev-{index:02d}": drawn(draw) for index in range(int(draw.integers(1, 13)))}
    settings = replace(USUAL, time_factor=float(draw.choice([1.0, 1.2, 1.5, 2.5, 100.0])))
    found = allocate(plant, settings)
    worth = values(plant)
    free = [d for d, profile in plant.items() if profile.fits and profile.drop > settings.min_drop]
    chosen = [device for device, choice in found.choices.items() if choice is Choice.QAT]
    mine = sum(worth[device] for device in chosen)
    tau = np.array([plant[device].seconds(Choice.QAT) for device in free])
    fixed = np.array([plant[device].seconds(Choice.PTQ) for device in free])
    rest = max((p.seconds(Choice.PTQ) for d, p in plant.items() if d not in free), default=0.0)
    masks = np.array(list(product([False, True], repeat=len(free))), bool).reshape(2 ** len(free), len(free))
    seconds = np.maximum(np.where(masks, tau, fixed).max(axis=1, initial=0.0), rest)
    gains = masks @ np.array([worth[device] for device in free]) if free else np.zeros(1)
    within = seconds <= found.budget_seconds
    assert mine >= gains[within].max() - 1e-12
    equal = within & (np.abs(gains - mine) < 1e-12)
    assert found.seconds <= seconds[equal].min() + 1e-12
    assert found.seconds == pytest.approx(round_seconds(plant, found.choices))


def drawn(draw: np.random.Generator) -> Profile:
    ptq = float(draw.uniform(1, 40))
    return Profile(
        ptq,
        ptq * float(draw.uniform(0.9, 3.0)),
        float(draw.uniform(0, 0.3)),
        float(draw.integers(1, 500)),
        skew=float(draw.uniform(0, 2)),
        drop=float(draw.uniform(-0.02, 0.1)),
        steps=int(draw.integers(1, 50)),
        fits=bool(draw.random() < 0.9),
    )


@pytest.mark.parametrize(
    ("field", "value", "detail"),
    [
        ("ptq_ms", math.nan, "ptq_ms is nan, expected above 0"),
        ("ptq_ms", 0.0, "ptq_ms is 0, expected above 0"),
        ("qat_ms", math.inf, "qat_ms is inf, expected above 0"),
        ("other_seconds", -1.0, "other_seconds is -1, expected 0 or more"),
        ("num_examples", 0.0, "num_examples is 0, expected above 0"),
        ("skew", -0.1, "skew is -0.1, expected 0 or more"),
        ("drop", 1.5, "drop is 1.5, expected from -1 to 1"),
        ("qat_ms", 7.0, "qat_ms / ptq_ms is 0.7, expected 0.8 to 20"),
        ("qat_ms", 201.0, "qat_ms / ptq_ms is 20.1, expected 0.8 to 20"),
    ],
)
def test_a_number_that_cannot_be_is_refused_and_the_device_does_ptq(field: str, value: float, detail: str) -> None:
    good = Profile(10.0, 12.0, 0.1, 100, drop=0.05, steps=20)
    bad = replace(good, **{field: value})
    found = allocate({"bad": bad, "good": good}, USUAL)
    assert found.verdicts["good"].choice is Choice.QAT
    assert (found.verdicts["bad"].choice, found.verdicts["bad"].reason) == (Choice.PTQ, Reason.UNPROFILED)
    assert found.verdicts["bad"].detail == detail
    assert math.isfinite(found.seconds)


def test_qat_is_taken_everywhere_where_its_step_costs_no_more_than_the_budget() -> None:
    """Convolution nets in onnxruntime: 1.00 to 1.05 times (section 6)."""
    plant = {f"{index}": Profile(ms, 1.05 * ms, 0.2, 100, drop=0.02) for index, ms in enumerate((3.0, 9.0, 40.0))}
    found = allocate(plant, USUAL)
    assert set(found.choices.values()) == {Choice.QAT}
    assert found.seconds <= USUAL.time_factor * found.least_seconds


def test_without_a_drop_nobody_does_qat() -> None:
    plant = {name: replace(profile, drop=0.004) for name, profile in PLANT.items()}
    assert set(allocate(plant, replace(USUAL, time_factor=math.inf)).choices.values()) == {Choice.PTQ}


def test_a_budget_below_what_ptq_takes_still_gives_what_is_free() -> None:
    found = allocate(PLANT, replace(USUAL, round_seconds=0.3))
    assert found.budget_seconds == found.least_seconds
    assert {d for d, choice in found.choices.items() if choice is Choice.QAT} == {"a", "c"}


def test_a_gain_that_is_asked_for_is_reached_with_the_fastest_devices() -> None:
    worth = values({device: PLANT[device] for device in "abcdef"})
    found = allocate(PLANT, replace(USUAL, min_gain=worth["a"] + 1e-6))
    assert {d for d, choice in found.choices.items() if choice is Choice.QAT} == {"a", "c"}
    assert found.verdicts["d"].reason is Reason.NO_NEED


@given(
    st.dictionaries(
        st.text("abc", min_size=1, max_size=3),
        st.builds(
            Profile,
            *(st.floats() for _ in range(4)),
            skew=st.floats(),
            drop=st.floats(),
            steps=st.integers(-5, 100),
            fits=st.booleans(),
        ),
        max_size=6,
    ),
    st.floats(1, 10),
)
def test_whatever_devices_claim_there_is_an_answer_within_the_budget(plant: dict[str, Profile], factor: float) -> None:
    found = allocate(plant, replace(USUAL, time_factor=factor))
    assert found.verdicts.keys() == plant.keys()
    assert found.seconds <= max(found.budget_seconds, found.least_seconds)
    assert allocate(dict(reversed(plant.items())), replace(USUAL, time_factor=factor)) == found
