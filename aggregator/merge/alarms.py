"""What the reports of the last merges say together: alarms of LoRA jobs (methods/lora.md, section 11). They inform; they
change nothing.

`truncation_high`: of some layer more than a fifth of what was wanted was cut off, three merges running. `rank_collapse`: ranks
differ, and the merged product of some layer has hardly more directions than the smallest of them can hold, three merges
running, while a device could train twice as many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

MERGES: Final = 3
TRUNCATION: Final = 0.2  # of the norm of what was wanted
MARGIN: Final = 0.5  # directions above the smallest rank


@dataclass(frozen=True)
class Warned:
    """An alarm: its kind, and which layers with which figures."""

    kind: str
    detail: str


def alarms(reports: Sequence[Mapping[str, Any]]) -> tuple[Warned, ...]:
    """The alarms after the last of `reports`, merge reports of consecutive rounds in order; fewer than three give none."""
    last = [report.get("layers", {}) for report in reports[-MERGES:]]
    if len(last) < MERGES:
        return ()
    layers = [name for name in last[-1] if all(name in merge for merge in last)]
    found = []
    cut = [name for name in layers if all(merge[name]["truncation_error"] > TRUNCATION for merge in last)]
    if cut:
        worst = max(cut, key=lambda name: last[-1][name]["truncation_error"])
        error = last[-1][worst]["truncation_error"]
        found.append(Warned("truncation_high", f"{error:.0%} of layer {worst!r} was cut off, {_so_often(cut)}"))
    flat = [name for name in layers if all(_collapsed(merge[name]) for merge in last)]
    if flat:
        worst = min(flat, key=lambda name: last[-1][name]["effective_rank"])
        entry = last[-1][worst]
        detail = f"layer {worst!r} has effective rank {entry['effective_rank']:.1f} among ranks {entry['ranks']}"
        found.append(Warned("rank_collapse", f"{detail}, {_so_often(flat)}"))
    return tuple(found)


def _collapsed(entry: Mapping[str, Any]) -> bool:
    """Whether the ranks of one layer differ by a factor of two or more and only the smallest is used."""
    effective, ranks = entry.get("effective_rank"), entry["ranks"]
    return effective is not None and ranks[-1] >= 2 * ranks[0] and effective < ranks[0] + MARGIN


def _so_often(layers: Sequence[str]) -> str:
    return f"{MERGES} merges running" + (f" ({len(layers)} layers)" if len(layers) > 1 else "")
