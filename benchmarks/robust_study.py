"""What attackers do to a federation, and what each robust rule makes of it: turned digits, full fine-tuning, ten clients.

Attacks by 0, 10 and 30 % of the clients: none, sign flip (the change times -5), scaling (the change times 20), Gaussian
noise in place of the update, and labels counted from the other end (9 - y). `attackers` of the rules is 0.3 throughout: a
gateway does not know how many there are.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from aggregator.merge import Rule
from aggregator.merge.mean import MEAN
from aggregator.merge.robust import GEOMETRIC_MEDIAN, KRUM, MEDIAN, MULTI_KRUM, NORM_CLIP, TRIMMED_MEAN
from aggregator.merge.settings import MergeSettings, RobustSettings
from benchmarks import report
from benchmarks.digits import CLIENTS, Task, build, federate, task
from benchmarks.runs import Runs
from edge_sdk.bundle import Bundle
from edge_sdk.tensors import Array, Tensors

RULES: dict[str, Rule] = {
    "mean": MEAN,
    "norm_clip": NORM_CLIP,
    "median": MEDIAN,
    "trimmed_mean": TRIMMED_MEAN,
    "krum": KRUM,
    "multi_krum": MULTI_KRUM,
    "geometric_median": GEOMETRIC_MEDIAN,
}
ATTACKS = ("none", "sign flip", "scaling", "gaussian", "label flip")
SHARES = (0.1, 0.3)
SPLITS: dict[str, float | None] = {"iid": None, "dirichlet 0.3": 0.3}
PROGRAM = "turned/full/float"


def attacked(kind: str, start: Tensors, trained: Tensors, draw: np.random.Generator) -> Tensors:
    """What a hostile client sends."""
    match kind:
        case "sign flip":
            return {name: start[name] - 5 * (value - start[name]) for name, value in trained.items()}
        case "scaling":
            return {name: start[name] + 20 * (value - start[name]) for name, value in trained.items()}
        case "gaussian":
            return {
                name: start[name]
                + draw.normal(0, 5 * float((value - start[name]).std()), value.shape).astype(np.float32)
                for name, value in trained.items()
            }
    return trained


def measure(args: argparse.Namespace) -> report.Report:
    """Every rule under every attack."""
    from export import ProgramSpec

    rows: list[dict[str, Any]] = []
    runs = Runs(args.runs)
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            path = Path(folder) / f"{seed}.bundle"
            build(path, task(seed, None), seed, [ProgramSpec("full", {}, "float", "adamw")])
            with Bundle.open(path) as bundle:
                for split, concentration in SPLITS.items():
                    data = task(seed, concentration)
                    for attack in ATTACKS:
                        for share in (0.0,) if attack == "none" else SHARES:
                            for name in RULES:
                                key = {"rule": name, "split": split, "attack": attack, "share": share, "seed": seed}
                                choices = {**key, "rounds": args.rounds}
                                rows.append(runs.row(choices, partial(_run, bundle, data, choices)))
    return report.Report(rows, _summary(rows))


def _run(bundle: Bundle, data: Task, chosen: dict[str, Any]) -> dict[str, Any]:
    hostile, attack = round(chosen["share"] * CLIENTS), chosen["attack"]

    def labels(client: int, y: Array) -> Array:
        return 9 - y if attack == "label flip" and client < hostile else y

    def sends(client: int, start: Tensors, trained: Tensors, draw: np.random.Generator) -> Tensors:
        return attacked(attack, start, trained, draw) if client < hostile else trained

    run = federate(
        bundle,
        data,
        RULES[chosen["rule"]],
        lambda client, number: PROGRAM,
        model=PROGRAM,
        rounds=chosen["rounds"],
        learning_rate=2e-3,
        seed=chosen["seed"],
        settings=MergeSettings(robust=RobustSettings(attackers=0.3)),
        labels=labels,
        attack=sends,
    )
    return {"final": run.final}


def _mean(rows: list[dict[str, Any]], **wanted: Any) -> float:
    return float(np.mean([row["final"] for row in rows if all(row[key] == value for key, value in wanted.items())]))


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The worst mean accuracy over attacks by 30 %, and what a rule costs without an attack, by split."""
    summary: dict[str, Any] = {}
    for split in SPLITS:
        plain = _mean(rows, split=split, attack="none", rule="mean")
        for name in RULES:
            worst = min(_mean(rows, split=split, rule=name, attack=attack, share=0.3) for attack in ATTACKS[1:])
            summary[f"{split}, {name}: worst of 30 %"] = worst
            summary[f"{split}, {name}: cost without attack"] = plain - _mean(
                rows, split=split, rule=name, attack="none"
            )
    return summary


def show(found: report.Report) -> str:
    """One line for each rule and split, one column for each attack and share."""
    rows = [dict(row) for row in found.rows]
    columns = {"split": "split", "rule": "rule", "none 0": "none"}
    columns |= {f"{attack} {share:g}": f"{attack} {share:.0%}" for attack in ATTACKS[1:] for share in SHARES}
    lines: list[dict[str, Any]] = []
    for split in SPLITS:
        for name in RULES:
            line: dict[str, Any] = {
                "split": split,
                "rule": name,
                "none 0": _mean(rows, split=split, rule=name, attack="none"),
            }
            for attack in ATTACKS[1:]:
                for share in SHARES:
                    line[f"{attack} {share:g}"] = _mean(rows, split=split, rule=name, attack=attack, share=share)
            lines.append(line)
    return report.table(lines, columns)


def arguments() -> argparse.ArgumentParser:
    """The options."""
    parser = report.parser("robust-study", __doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--runs", type=Path, metavar="FILE", help="keep every run there, and repeat none that it holds")
    return parser


if __name__ == "__main__":
    sys.exit(report.main(measure, show, arguments()))
