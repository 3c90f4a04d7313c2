"""PTQ or QAT for each device: the fine step, which learns from rounds what QAT on a device really changes.

The change of the validation loss of a round is taken as linear in what the QAT devices of that round are like
(methods/precision.md, section 3),

    y_t = theta' phi_t + beta_0 + beta_1 log(1 + t) + noise,      phi_t = sum over QAT devices of p_k x_k,

with x_k = (u_k, log tP_k, rho_k, log p_k, kappa_k, b_k / 8, 1) and u_k = (1 + kappa_k) delta_k. The prior mean is -1 on u_k
and 0 elsewhere: before any data, -theta' x_k is what the coarse step takes for the value. Time is not learned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from aggregator.assign.precision_coarse import Choice, Profile

Vector = npt.NDArray[np.float64]
FEATURES: Final = 7
COEFFICIENTS: Final = FEATURES + 2
PRIOR_ROUNDS: Final = 10.0
FORGETTING: Final = 0.97
_SMALLEST: Final = 1e-6  # of a feature's scale


@dataclass(frozen=True)
class Scale:
    """How features are standardised, [7] each: `(x - centre) / spread`; `weight`: what phi is when all devices do QAT.

    It is made once, at the first coarse step: statistics of differently scaled features could not be added.
    """

    centre: tuple[float, ...]
    spread: tuple[float, ...]
    weight: tuple[float, ...]

    @classmethod
    def of(cls, profiles: Mapping[str, Profile]) -> Scale:
        """From all usable profiles, at least one."""
        shares = shares_of(profiles)
        rows = np.array([_raw(profiles[device], shares[device]) for device in sorted(profiles)])
        centre, spread = rows.mean(axis=0), rows.std(axis=0)
        centre[[0, -1]], spread[[0, -1]] = 0.0, 1.0  # u and the constant stay as they are
        spread[spread < _SMALLEST] = 1.0
        by = np.array([shares[device] for device in sorted(profiles)])
        weight = np.maximum(by @ np.abs((rows - centre) / spread), _SMALLEST)
        return cls(tuple(centre.tolist()), tuple(spread.tolist()), tuple(weight.tolist()))

    def features(self, profile: Profile, share: float) -> Vector:
        """x_k, float64 [7]."""
        return np.asarray((_raw(profile, share) - np.array(self.centre)) / np.array(self.spread), np.float64)


@dataclass(frozen=True)
class Statistics:
    """Discounted sums of z z' ([9, 9], row by row) and z y ([9]), z = (phi, 1, log(1 + t)): a monoid."""

    gram: tuple[float, ...] = (0.0,) * COEFFICIENTS**2
    moment: tuple[float, ...] = (0.0,) * COEFFICIENTS

    def add(self, phi: Vector, number: int, change: float) -> Statistics:
        """One round more: what it changed the validation loss by; older rounds count a little less."""
        z = np.array([*phi, 1.0, math.log1p(number)])
        gram = FORGETTING * np.array(self.gram) + np.outer(z, z).ravel()
        moment = FORGETTING * np.array(self.moment) + z * change
        return Statistics(tuple(gram.tolist()), tuple(moment.tolist()))

    def combine(self, other: Statistics) -> Statistics:
        """The sums of both."""
        gram = np.array(self.gram) + np.array(other.gram)
        moment = np.array(self.moment) + np.array(other.moment)
        return Statistics(tuple(gram.tolist()), tuple(moment.tolist()))

    def theta(self, scale: Scale) -> Vector:
        """The ridge solution's theta, float64 [7]; the prior counts as `PRIOR_ROUNDS` rounds in which all did QAT."""
        size = np.array([*scale.weight, 1.0, 1.0])
        prior = np.zeros(COEFFICIENTS)
        prior[0] = -1.0
        strength = PRIOR_ROUNDS * np.diag(size**2)
        gram = np.array(self.gram).reshape(COEFFICIENTS, COEFFICIENTS)
        solved = np.linalg.solve(gram + strength, np.array(self.moment) + strength @ prior)
        return np.asarray(solved[:FEATURES], np.float64)


def shares_of(profiles: Mapping[str, Profile]) -> dict[str, float]:
    """p_k: each device's share of the examples."""
    total = sum(profile.num_examples for profile in profiles.values())
    return {device: profile.num_examples / total for device, profile in profiles.items()}


def phi_of(profiles: Mapping[str, Profile], choices: Mapping[str, Choice], scale: Scale) -> Vector:
    """phi of an allocation, float64 [7]."""
    shares = shares_of(profiles)
    phi = np.zeros(FEATURES)
    for device in sorted(profiles):
        if choices.get(device) is Choice.QAT:
            phi += shares[device] * scale.features(profiles[device], shares[device])
    return phi


def is_worse(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether the mean loss rose by more than one standard error of the difference; False without two of each."""
    if min(len(before), len(after)) < 2:
        return False
    error = math.sqrt(np.var(before, ddof=1) / len(before) + np.var(after, ddof=1) / len(after))
    return bool(np.mean(after) - np.mean(before) > error)


def to_json(value: Scale | Statistics | None) -> Any:
    """A list of lists, for the journal."""
    return None if value is None else [list(part) for part in vars(value).values()]


def _raw(profile: Profile, share: float) -> Vector:
    return np.array(
        [
            profile.worth,
            math.log(profile.ptq_ms),
            profile.ratio,
            math.log(share),
            profile.skew,
            profile.bits / 8,
            1.0,
        ]
    )
