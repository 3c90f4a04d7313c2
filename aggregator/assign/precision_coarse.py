"""PTQ or QAT for each device: the coarse step, global and exact, after FedHQ (Zheng et al., arXiv 2505.11982).

Published are the inputs (speed and data of each device), the output and the structure: a coarse global allocation first,
then a fine learned one (`aggregator.assign.precision_fine`). The formulas are ours (methods/precision.md, sections 1 and
2), and a synchronous round is assumed: it takes as long as its slowest device,

    T(z) = max_k (E_k t_k^z + c_k),      T_min = T(all PTQ),      tau_k = E_k tQ_k + c_k.

T changes at a tau_k only. An upgrade to QAT is worth v_k = p_k (1 + kappa_k) max(delta_k, 0), which is never negative, so
upgrading every device with tau_k <= T* and delta_k > min_drop has the largest value of all allocations within the
budget T*, and of those the smallest T. Nothing here reads a clock, a file or a network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from aggregator.assign.settings import PrecisionSettings

RATIO_LIMITS: Final = (0.8, 20.0)  # of tQ / tP; a device outside has measured something else


class Choice(StrEnum):
    """Which of the two programs a device trains; the values are the keys of `assign.precision.programs`."""

    PTQ = "ptq"
    QAT = "qat"


class Reason(StrEnum):
    """Why."""

    FREE = "free"  # the round is no longer for it than with PTQ alone
    WITHIN_BUDGET = "within-budget"
    TOO_SLOW = "too-slow"
    NO_DROP = "no-drop"  # PTQ costs this device no accuracy
    NO_NEED = "no-need"  # others give the gain that was asked for
    DOES_NOT_FIT = "does-not-fit"
    UNPROFILED = "unprofiled"
    MEASURING = "measuring"  # one round of QAT, since nobody knows what its step costs here
    LEARNED = "learned"
    EXPLORED = "explored"
    FINAL = "final-phase"


@dataclass(frozen=True)
class Profile:
    """What the allocation knows of a device: the six numbers of section 1, and what bundle and task say.

    `ptq_ms`, `qat_ms`: milliseconds of a step; `other_seconds`: transfer and queue in a round; `skew`: kappa, nats;
    `drop`: delta, accuracy from -1 to 1; `steps` of a task; `fits`: the QAT program fits the device.
    Self-reported, so they steer time and precision only.
    """

    ptq_ms: float
    qat_ms: float
    other_seconds: float
    num_examples: float
    skew: float = 0.0
    drop: float = 0.0
    steps: int = 1
    bits: int = 8
    fits: bool = True

    def seconds(self, choice: Choice) -> float:
        """How long a round takes this device."""
        return self.steps * (self.qat_ms if choice is Choice.QAT else self.ptq_ms) / 1000 + self.other_seconds

    @property
    def ratio(self) -> float:
        """rho: what a QAT step costs, in PTQ steps."""
        return self.qat_ms / self.ptq_ms

    @property
    def worth(self) -> float:
        """(1 + kappa) delta."""
        return (1.0 + self.skew) * self.drop

    @property
    def refusal(self) -> str:
        """What makes the profile useless, "" if nothing does: field, finding, expectation."""
        for name, value, least, most, open_below in (
            ("ptq_ms", self.ptq_ms, 0.0, math.inf, True),
            ("qat_ms", self.qat_ms, 0.0, math.inf, True),
            ("other_seconds", self.other_seconds, 0.0, math.inf, False),
            ("num_examples", self.num_examples, 0.0, math.inf, True),
            ("steps", self.steps, 0.0, math.inf, True),
            ("skew", self.skew, 0.0, math.inf, False),
            ("drop", self.drop, -1.0, 1.0, False),
        ):
            if not least <= value <= most or value == math.inf or (open_below and value == least):
                expected = (
                    "above 0" if open_below else "0 or more" if most == math.inf else f"from {least:g} to {most:g}"
                )
                return f"{name} is {value:g}, expected {expected}"
        least, most = RATIO_LIMITS
        if not least <= self.ratio <= most:
            return f"qat_ms / ptq_ms is {self.ratio:.3g}, expected {least:g} to {most:g}"
        return ""


@dataclass(frozen=True)
class Verdict:
    """What one device does, and why; `detail` names the figures."""

    choice: Choice
    reason: Reason
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else str(self.reason)


@dataclass(frozen=True)
class Allocation:
    """What the coarse step found. Seconds are those of a round; `breakpoints` are (tau_k, device), ascending.

    `budget_seconds`: T*, infinite where time is not what limits.
    """

    verdicts: Mapping[str, Verdict]
    breakpoints: tuple[tuple[float, str], ...]
    seconds: float
    least_seconds: float
    budget_seconds: float

    @property
    def choices(self) -> dict[str, Choice]:
        """device -> what it does."""
        return {device: verdict.choice for device, verdict in self.verdicts.items()}


def allocate(profiles: Mapping[str, Profile], settings: PrecisionSettings) -> Allocation:
    """The coarse step, O(K log K).

    With `min_gain` the breakpoints are walked upward until the sum of values, in accuracy, is reached. A
    budget below T_min cannot be kept; what costs no more than T_min is upgraded all the same. Ties go by device id.
    """
    verdicts: dict[str, Verdict] = {}
    able: dict[str, Profile] = {}
    known = {device: profile for device, profile in sorted(profiles.items()) if not profile.refusal}
    for device, profile in sorted(profiles.items()):
        if profile.refusal:
            verdicts[device] = Verdict(Choice.PTQ, Reason.UNPROFILED, profile.refusal)
        elif not profile.fits:
            verdicts[device] = Verdict(Choice.PTQ, Reason.DOES_NOT_FIT, "the QAT program needs more memory than it has")
        elif profile.drop <= settings.min_drop:
            detail = f"PTQ costs {profile.drop:.4f}, min_drop is {settings.min_drop:g}"
            verdicts[device] = Verdict(Choice.PTQ, Reason.NO_DROP, detail)
        else:
            able[device] = profile
    least = round_seconds(known, {})
    budget = _budget(able, known, least, settings)
    breakpoints = tuple(sorted((profile.seconds(Choice.QAT), d) for d, profile in known.items() if profile.fits))
    for device, profile in able.items():
        verdicts[device] = _verdict(profile, least, budget, settings)
    ordered = dict(sorted(verdicts.items()))
    choices = {device: verdict.choice for device, verdict in ordered.items()}
    return Allocation(ordered, breakpoints, round_seconds(known, choices), least, budget)


def round_seconds(profiles: Mapping[str, Profile], choices: Mapping[str, Choice]) -> float:
    """T(z), seconds; a device that `choices` does not name does PTQ. 0 without devices."""
    return max((p.seconds(choices.get(device, Choice.PTQ)) for device, p in profiles.items()), default=0.0)


def values(profiles: Mapping[str, Profile]) -> dict[str, float]:
    """v_k of each device: accuracy of the whole, from 0 to 1."""
    total = sum(profile.num_examples for profile in profiles.values())
    return {d: p.num_examples / total * max(p.worth, 0.0) for d, p in profiles.items()}


def _budget(
    able: Mapping[str, Profile], known: Mapping[str, Profile], least: float, settings: PrecisionSettings
) -> float:
    if settings.budget == "round_seconds":
        return max(settings.round_seconds, least)
    if settings.budget == "time_factor":
        return settings.time_factor * least if least else 0.0
    worth, gained = values(known), 0.0
    for seconds, device in sorted((profile.seconds(Choice.QAT), device) for device, profile in able.items()):
        gained += worth[device]
        if gained >= settings.min_gain:
            return max(seconds, least)
    return math.inf


def _verdict(profile: Profile, least: float, budget: float, settings: PrecisionSettings) -> Verdict:
    needed = profile.seconds(Choice.QAT)
    if needed > budget and settings.budget == "min_gain":
        return Verdict(Choice.PTQ, Reason.NO_NEED, f"faster devices give the gain of {settings.min_gain:g}")
    if needed > budget:
        return Verdict(Choice.PTQ, Reason.TOO_SLOW, f"a round would take it {needed:.3g} s, at most {budget:.3g} s")
    if needed <= least:
        return Verdict(Choice.QAT, Reason.FREE, f"{needed:.3g} s, a round takes {least:.3g} s in any case")
    return Verdict(Choice.QAT, Reason.WITHIN_BUDGET, f"{needed:.3g} s of at most {budget:.3g} s")
