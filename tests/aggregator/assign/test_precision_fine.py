"""The rounds of an allocation: what is learned, taken back, and done at once when a device slows down."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pytest

from aggregator.assign.precision import (
    Event,
    Joined,
    Left,
    Opened,
    Profiled,
    State,
    Trained,
    Validated,
    decide,
    state_from_json,
    state_to_json,
)
from aggregator.assign.precision_coarse import Choice, Profile, allocate, round_seconds
from aggregator.assign.precision_fine import COEFFICIENTS, Scale, Statistics
from aggregator.assign.settings import FineSettings, PrecisionSettings

STEPS = 20
COARSE_ONLY = PrecisionSettings(final_qat=0.0, fine=FineSettings(every=0))
LEARNS = PrecisionSettings(final_qat=0.0)


@dataclass
class Plant:
    """Simulated devices: what a step really takes them, and what QAT really changes the loss by, by device."""

    settings: PrecisionSettings
    ptq_ms: dict[str, float]
    ratio: float = 2.5
    drop: Mapping[str, float] = field(default_factory=dict)
    loss: Callable[[Mapping[str, Choice], int], float] | None = None
    rounds: int = 60

    def __post_init__(self) -> None:
        drops = {device: self.drop.get(device, 0.05) for device in self.ptq_ms}
        joined = [Joined(d, 4, self.ratio, drops[d], measured=True) for d in self.ptq_ms]
        self.state, _, _ = decide(State(self.settings), joined)
        self.news: list[Event] = [self.update(device, Choice.PTQ) for device in self.ptq_ms]
        self.number = 0
        self.reasons: Mapping[str, str] = {}

    def join(self, device: str, ms: float, *, fits: bool = True) -> None:
        self.ptq_ms[device] = ms
        self.news += [Joined(device, 4, self.ratio, 0.05, fits, measured=True), self.update(device, Choice.PTQ)]

    def update(self, device: str, choice: Choice) -> Trained:
        ms = self.ptq_ms[device] * (self.ratio if choice is Choice.QAT else 1.0)
        return Trained(device, choice, ms, STEPS, STEPS * ms / 1000 + 0.1, 100)

    def play(self) -> Mapping[str, Choice]:
        """One round; the state goes through the journal's JSON."""
        self.number += 1
        saved = json.loads(json.dumps(state_to_json(self.state)))
        assert state_from_json(self.settings, saved) == self.state
        self.state, choices, self.reasons = decide(self.state, [*self.news, Opened(self.number, self.rounds)])
        self.news = [self.update(device, choice) for device, choice in choices.items()]
        if self.loss is not None:
            self.news.append(Validated(self.loss(choices, self.number)))
        return choices

    def seconds(self, choices: Mapping[str, Choice]) -> float:
        return round_seconds(self.truth(), choices)

    def truth(self) -> dict[str, Profile]:
        return {
            d: Profile(ms, ms * self.ratio, 0.1, 100, drop=self.drop.get(d, 0.05), steps=STEPS, bits=4)
            for d, ms in self.ptq_ms.items()
        }


def even_plant(settings: PrecisionSettings, **more: object) -> Plant:
    """Ten devices with steps of 10 to 40 ms."""
    return Plant(settings, {f"dev-{i}": 10.0 * 4 ** (i / 9) for i in range(10)}, **more)


def test_the_first_rounds_measure_and_then_the_optimum_is_taken() -> None:
    devices = {"fast": 10.0, "slow": 40.0}
    state, _, _ = decide(State(COARSE_ONLY), [Joined(d, 4, 1.0, 0.05) for d in devices])  # the guess is wrong
    found, why = [], []
    for number in range(1, 5):
        state, choices, reasons = decide(state, [Opened(number, 100)])
        found.append({str(choice) for choice in choices.values()} if number < 3 else dict(choices))
        why.append(reasons)
        for device, choice in choices.items():
            ms = devices[device] * (2.5 if choice is Choice.QAT else 1)
            state, _, _ = decide(state, [Trained(device, choice, ms, STEPS, STEPS * ms / 1000, 50)])
    assert found[:2] == [{"ptq"}, {"qat"}]
    assert found[2] == found[3] == {"fast": Choice.QAT, "slow": Choice.PTQ}
    assert why[0]["fast"] == "unprofiled: no step of it was measured yet"
    assert why[1]["slow"].startswith("measuring")
    assert why[3]["fast"].startswith("free: 0.5 s")
    assert why[3]["slow"].startswith("too-slow: a round would take it 2 s, at most 0.96 s")


def test_the_last_rounds_are_qat_for_every_device_that_fits() -> None:
    settings = replace(LEARNS, final_qat=0.16)
    plant = even_plant(settings, rounds=25)
    plant.join("small", 10.0, fits=False)
    for number in range(1, 26):
        choices = plant.play()
        slowest = choices["dev-9"]
        assert (slowest is Choice.QAT) is (number > 21)
        assert choices["small"] is Choice.PTQ
    assert plant.reasons["dev-9"] == "final-phase: the last 4 of 25 rounds"
    assert plant.reasons["small"].startswith("does-not-fit")


def test_a_device_that_slows_down_is_allocated_anew_at_once() -> None:
    """One throttles to a third at round 10: the round time returns to the new optimum; a frozen allocation does not."""
    plant = even_plant(LEARNS)
    for _ in range(9):
        choices = plant.play()
    throttled = "dev-3"
    assert choices[throttled] is Choice.QAT
    frozen = dict(choices)
    plant.ptq_ms[throttled] *= 3
    best = allocate(plant.truth(), LEARNS).seconds
    after = [plant.play() for _ in range(LEARNS.fine.every)]
    seconds = [plant.seconds(choices) for choices in after]
    assert any(choices != frozen for choices in after)
    assert seconds[-1] <= 1.2 * best
    assert plant.seconds(frozen) > 1.2 * best
    assert plant.reasons[throttled].startswith("too-slow")


def test_a_short_hiccup_changes_nothing() -> None:
    plant = even_plant(COARSE_ONLY)
    plant.play()
    before = plant.play()
    for index in range(4):
        slow = plant.update("dev-0", before["dev-0"])
        if index % 2 == 0:
            plant.news[0] = replace(slow, seconds=2 * slow.seconds)
        assert plant.play() == before


def test_devices_that_come_and_go_are_allocated_at_once() -> None:
    plant = even_plant(COARSE_ONLY)
    before = plant.play()
    assert before["dev-8"] is Choice.PTQ
    plant.join("dev-x", 400.0)
    with_slow = plant.play()
    assert set(with_slow) == {*before, "dev-x"}
    assert with_slow["dev-8"] is Choice.QAT  # free now
    plant.news.append(Left("dev-x"))
    assert plant.play() == before


def harmful_on_dev_9(choices: Mapping[str, Choice], number: int) -> float:
    """Loss 0.5 with a little noise, and 0.05 more while dev-9 does QAT."""
    noise = float(np.random.default_rng([number, 3]).normal(0, 0.002))
    return 0.5 + noise + (0.05 if choices["dev-9"] is Choice.QAT else 0.0)


def test_a_harmful_change_is_taken_back_within_two_looks() -> None:
    """The device reports a drop just below `min_drop`, so the coarse step leaves it, and the fine step tries it."""
    settings = replace(LEARNS, time_factor=3.0, min_drop=0.04, fine=FineSettings(explore=0.0, time_price=0.0))
    drops = {f"dev-{i}": 0.05 for i in range(9)} | {"dev-9": 0.039}
    plant = even_plant(settings, drop=drops, loss=harmful_on_dev_9)
    tried = undone = None
    for number in range(1, 41):
        choices = plant.play()
        if choices["dev-9"] is Choice.QAT and tried is None:
            tried = number
        if tried is not None and choices["dev-9"] is Choice.PTQ and undone is None:
            undone = number
            assert plant.reasons["dev-9"].startswith("learned: changed back")
        if undone is not None and number < undone + 3 * settings.fine.every:
            assert choices["dev-9"] is Choice.PTQ  # it rests
    assert tried is not None
    assert undone is not None
    assert undone <= tried + 2 * settings.fine.every


@pytest.mark.parametrize("field", ["step_ms", "seconds", "num_examples"])
def test_a_bad_report_makes_the_device_unprofiled_until_a_good_one_comes(field: str) -> None:
    plant = even_plant(COARSE_ONLY)
    assert plant.play()["dev-0"] is Choice.QAT
    good = plant.update("dev-0", Choice.QAT)
    plant.news[0] = replace(good, **{field: math.nan})
    assert plant.play()["dev-0"] is Choice.PTQ
    expected = "0.0001 to 1e+08" if field == "step_ms" else "above 0"
    assert plant.reasons["dev-0"] == f"unprofiled: {field} is nan, expected {expected}"
    assert plant.play()["dev-0"] is Choice.QAT


def test_what_a_device_finds_in_its_data_counts() -> None:
    plant = even_plant(COARSE_ONLY)
    assert plant.play()["dev-0"] is Choice.QAT
    plant.news.append(Profiled("dev-0", drop=0.001))
    assert plant.play()["dev-0"] is Choice.PTQ
    assert plant.reasons["dev-0"].startswith("no-drop")
    plant.news.append(Profiled("dev-0", skew=-1.0, drop=0.1))
    assert plant.play()["dev-0"] is Choice.PTQ
    assert plant.reasons["dev-0"] == "unprofiled: skew is -1, expected 0 or more"


def test_a_ratio_that_cannot_be_is_measured_again() -> None:
    plant = even_plant(COARSE_ONLY)
    plant.play()
    for choice, ms in ((Choice.PTQ, 10.0), (Choice.QAT, 400.0)):
        plant.news = [Trained("dev-0", choice, ms, STEPS, STEPS * ms / 1000 + 0.1, 100)]
        plant.play()
    assert "qat_ms / ptq_ms is" in plant.reasons["dev-0"]
    assert Choice.QAT in [plant.play()["dev-0"] for _ in range(10)]
    assert plant.play()["dev-0"] is Choice.QAT
    assert plant.reasons["dev-0"].startswith("free")


def test_the_same_events_give_the_same_decisions() -> None:
    def run() -> list[Mapping[str, Choice]]:
        settings = replace(LEARNS, fine=FineSettings(explore=0.5))
        plant = even_plant(settings, loss=lambda c, n: 1 / (n + sum(x is Choice.QAT for x in c.values())))
        return [plant.play() for _ in range(40)]

    first = run()
    assert first == run()
    assert any(a != b for a, b in pairwise(first))  # it explored


def test_before_any_data_the_learned_value_is_the_coarse_one_and_data_replace_it() -> None:
    plant = even_plant(LEARNS).truth()
    scale = Scale.of(plant)
    assert Statistics().theta(scale).tolist() == pytest.approx([-1.0, *[0.0] * 6])
    truth = np.array([0.5, -0.02, 0.01, 0.0, 0.0, 0.0, 0.03])
    draw = np.random.default_rng(0)
    found = Statistics()
    for number in range(400):
        phi = draw.normal(0, 1, 7) * np.array(scale.weight)
        found = found.add(phi, number, float(truth @ phi + 0.001 - 0.0005 * np.log1p(number)))
    weight = np.array(scale.weight)
    assert (
        np.abs((found.theta(scale) - truth) * weight).max()
        < 0.4 * np.abs((Statistics().theta(scale) - truth) * weight).max()
    )


def test_statistics_are_a_monoid() -> None:
    draw = np.random.default_rng(1)
    parts = [Statistics().add(draw.normal(size=7), n, float(draw.normal())) for n in range(3)]
    left = parts[0].combine(parts[1]).combine(parts[2])
    right = parts[0].combine(parts[1].combine(parts[2]))
    assert np.allclose(left.gram, right.gram, rtol=1e-12)
    assert parts[0].combine(Statistics()) == parts[0]
    assert len(left.gram) == COEFFICIENTS**2


def learning_run(seed: int, *, learns: bool) -> tuple[float, int]:
    """Sixty rounds in which the true gains of QAT are the reported ones permuted over devices, half of them harmful.

    The validation loss falls by what the QAT devices of a round gain, with noise. Returns the last loss and how often the
    allocation changed.
    """
    draw = np.random.default_rng(seed)
    names = [f"dev-{index:02d}" for index in range(12)]
    reported = np.linspace(-0.04, 0.08, len(names))
    truth = dict(zip(names, draw.permutation(reported), strict=True))
    settings = replace(LEARNS, time_factor=2.6, fine=FineSettings(every=5 if learns else 0, max_flips=0.1, seed=seed))
    noise = draw.normal(0, 2e-4, 200)
    level = [1.0]

    def loss(choices: Mapping[str, Choice], number: int) -> float:
        gain = np.mean([truth[d] if c is Choice.QAT else 0.0 for d, c in choices.items()])
        level.append(level[-1] - 0.1 * float(gain) - 0.002 / number)
        return level[-1] + float(noise[number])

    plant = Plant(
        settings,
        {name: 10.0 + float(draw.uniform(0, 5)) for name in names},
        drop=dict(zip(names, reported.tolist(), strict=True)),
        loss=loss,
    )
    seen = [plant.play() for _ in range(60)]
    return level[-1], sum(a != b for a, b in pairwise(seen))


def test_learning_ends_with_no_greater_loss_than_the_coarse_step_alone() -> None:
    coarse = [learning_run(seed, learns=False) for seed in range(12)]
    learned = [learning_run(seed, learns=True) for seed in range(12)]
    gain = [a - b for (a, _), (b, _) in zip(coarse, learned, strict=True)]
    print(f"mean loss lower by {np.mean(gain):.4f} ({np.std(gain, ddof=1) / np.sqrt(len(gain)):.4f} standard error)")
    assert np.mean(gain) >= 0
    assert all(changes == 0 for _, changes in coarse)
    assert sum(changes > 0 for _, changes in learned) > 6


def test_a_decision_takes_well_below_half_a_percent_of_a_round() -> None:
    plant = even_plant(LEARNS, loss=lambda c, n: 1.0 / n)
    began = time.process_time()
    for _ in range(50):
        choices = plant.play()
    assert (time.process_time() - began) / 50 < 0.005 * plant.seconds(choices)
