"""The gate: whether a merged model replaces its predecessor, on evidence that nobody trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Counts = tuple[float, float]  # sum and count of a score


@dataclass(frozen=True)
class Verdict:
    """`before` and `after` are the pooled scores of the devices that measured both models, None where there are none."""

    accepted: bool
    reason: str
    before: float | None
    after: float | None


def judge(
    before: Mapping[str, Counts],
    after: Mapping[str, Counts],
    *,
    better: str,
    tolerance: float,
    min_examples: int,
    validation_before: Counts | None = None,
    validation_after: Counts | None = None,
) -> Verdict:
    """Compare a candidate (`after`) with the model it would replace (`before`).

    `before` and `after` map devices to (sum, count); only devices in both are pooled, so that a device that comes or goes
    does not look like a change of the model. `better` is "higher" or "lower". The candidate is refused if it is worse
    than its predecessor by more than `tolerance` in either source: the devices' counts (where they hold `min_examples` or
    more) and the gateway's validation file. Without any evidence it is accepted, and the reason says so.
    """
    both = sorted(before.keys() & after.keys())
    old, new = _pool(before, both), _pool(after, both)
    findings = []
    if new is not None and old is not None and sum(after[device][1] for device in both) >= min_examples:
        findings.append((f"{len(both)} devices", old, new))
    if validation_before is not None and validation_after is not None:
        findings.append(("the validation file", _score(validation_before), _score(validation_after)))
    pooled_after = _pool(after, sorted(after)) if new is None else new
    for source, was, now in findings:
        loss = was - now if better == "higher" else now - was
        if loss > tolerance:
            return Verdict(
                False,
                f"{source}: {was:.4f} before, {now:.4f} after; worse by {loss:.4f}, tolerated {tolerance:g}",
                old,
                pooled_after,
            )
    if not findings:
        return Verdict(True, "accepted without evidence: no device measured both models", old, pooled_after)
    told = "; ".join(f"{source}: {was:.4f} before, {now:.4f} after" for source, was, now in findings)
    return Verdict(True, told, old, pooled_after)


def _pool(counts: Mapping[str, Counts], devices: list[str]) -> float | None:
    count = sum(counts[device][1] for device in devices)
    return sum(counts[device][0] for device in devices) / count if count > 0 else None


def _score(counts: Counts) -> float:
    return counts[0] / counts[1]
