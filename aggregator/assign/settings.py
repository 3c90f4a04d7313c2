"""What a job file says about the work of each device: `[assign]`, `[assign.rank]`, `[assign.precision]` and its `fine` (aggregator/job.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

BUDGETS = ("time_factor", "round_seconds", "min_gain")


@dataclass(frozen=True)
class FineSettings:
    """`[assign.precision] fine` (methods/precision.md, section 3).

    `every`: rounds between two looks, 0 for none; `max_flips`: the share of devices that change at once; `explore`: how
    often one does so at random; `time_price`: loss per unit of relative time.
    """

    every: int = 5
    max_flips: float = 0.05
    explore: float = 0.05
    time_price: float = 0.01
    seed: int = 7


@dataclass(frozen=True)
class PrecisionSettings:
    """`[assign.precision]` (methods/precision.md, section 3).

    `programs` maps `ptq` and `qat` to program ids. Exactly one of `BUDGETS` counts: `time_factor` unless another is above
    0. `drop`: the accuracy, from 0 to 1, that PTQ costs where neither device nor bundle has measured it.
    """

    programs: Mapping[str, str] = field(default_factory=dict)
    time_factor: float = 1.2
    round_seconds: float = 0.0
    min_gain: float = 0.0
    min_drop: float = 0.005
    drop: float = 0.0
    final_qat: float = 0.16
    fine: FineSettings = field(default_factory=FineSettings)

    @property
    def budget(self) -> str:
        """Which of `BUDGETS` counts."""
        return next((name for name in BUDGETS[1:] if getattr(self, name) > 0), BUDGETS[0])


@dataclass(frozen=True)
class RankSettings:
    """`[assign.rank]`. `profiles`: device -> its profile, by name or as a file (devices/profile.py)."""

    profiles: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AssignSettings:
    """`[assign]`. `rule`: an entry point of the group `edgewise.assigners`."""

    rule: str = "fixed"
    programs: Mapping[str, str] = field(default_factory=dict)
    cycle: Sequence[str] = ()
    precision: PrecisionSettings = field(default_factory=PrecisionSettings)
    rank: RankSettings = field(default_factory=RankSettings)
