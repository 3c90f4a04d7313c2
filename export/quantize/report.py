"""What is known of a quantized model, and the gates that it must pass (methods/precision.md, section 8.11).

    fusion     no product and no residual sum is left in float where the recipe says integers
    accuracy   the score falls by at most the tolerance
    latency    it takes no more CPU time than the float model on the machine where both were measured
    budget     it fits the flash of the profile

A failing gate stops the export; `--allow GATE` lets it pass, and the report says so. Latency is the exception: a model
that is slower in integers ships in float where the flash permits that, and the report says why.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from export.errors import ExportError

GATES: Final = ("fusion", "accuracy", "latency", "budget")


class GateFailed(ExportError):
    """A quantized model that must not be flashed as it is."""

    exit_code = 6


@dataclass(frozen=True)
class Violation:
    """A gate that was not passed: which, what was found, and what to do."""

    gate: str
    finding: str
    advice: str


@dataclass(frozen=True)
class QuantReport:
    """Figures of a float model and of its integer form.

    `method`: what was done, in order. Scores are shares: of right answers, or of the variance explained. `agreement`: how
    often both name the same class (None: there are none). `snr_db`: signal to error of the output, and of each weight in `weight_snr_db`.
    `cpu_us`: least CPU time of a sample, interleaved; `vmhwm_kb` of a fresh process. `ships`: "integer" or "float".
    """

    bits: int
    method: tuple[str, ...]
    ships: str
    reason: str
    float_score: float
    integer_score: float
    agreement: float | None
    snr_db: float
    weight_snr_db: dict[str, float]
    integer_kernels: int
    float_kernels: tuple[str, ...]
    float_bytes: int
    raw_bytes: int
    integer_bytes: int
    float_cpu_us: float
    integer_cpu_us: float
    float_vmhwm_kb: int | None
    integer_vmhwm_kb: int | None
    violations: tuple[Violation, ...]
    allowed: tuple[str, ...]
    machine: str
    runtime: str

    @property
    def cpu_ratio(self) -> float:
        """CPU time of the float model over that of the integer one: above 1 the integers are faster."""
        return self.float_cpu_us / self.integer_cpu_us

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, for the manifest and `--json`."""
        return {**asdict(self), "cpu_ratio": round(self.cpu_ratio, 3)}


def check_gates(violations: Sequence[Violation], allowed: Collection[str], name: str) -> None:
    """Raise `GateFailed` naming every gate that was not passed and is not allowed to fail."""
    failed = [v for v in violations if v.gate not in allowed and v.gate != "latency"]
    if failed:
        raise GateFailed(
            "\n".join([f"{name}: nothing was written:", *(f"  {v.gate}: {v.finding}; {v.advice}" for v in failed)])
        )
