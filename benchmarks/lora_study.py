"""Which rule merges LoRA adapters best, on a task of seconds: paired seeds, every rule at its own learning rate.

Three tables. `rules`: all rules at one learning rate over three splits, with the error that averaging factors would make.
`lr`: the grid of learning rates, and each rule at its best, since a comparison at one rate is worthless. `ranks`: clients
of rank 2, 4 and 8 in one round. The setup is that of `benchmarks.digits`, with `--data fashion` on Fashion-MNIST; what may
and may not be concluded stands in docs/lora-study.md.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aggregator.merge import Rule
from aggregator.merge.lora import (
    ALTERNATE,
    FACTOR_MEAN,
    FAIR,
    FEDSVD,
    FREEZE_A,
    PRODUCT_SVD,
    RANK_PARTITION,
    RESIDUAL,
    STACK,
    ZERO_PADDING,
)
from aggregator.merge.mean import MEAN
from aggregator.merge.settings import LoraSettings, MergeSettings
from benchmarks import report
from benchmarks.digits import Run, Task, build, fashion, federate, interval, task
from benchmarks.runs import Runs
from edge_sdk.bundle import Bundle

SPLITS: dict[str, float | None] = {"iid": None, "dirichlet 0.3": 0.3, "dirichlet 0.1": 0.1}
RATES = (2.5e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
ONE_RATE = 5e-3
MIXED_ROUNDS = 12
DATA: dict[str, Callable[[int, float | None], Task]] = {"digits": task, "fashion": fashion}
GOALS = {"digits": 0.8, "fashion": 0.7}  # accuracies that are worth counting rounds to
SIDE = 96  # of a side term: it never overflows here, so `stack` and `residual` are exact
AB, A, B = "turned/lora/r4/float", "turned/lora/r4/a/float", "turned/lora/r4/b/float"
MIXED = ("turned/lora/r2/float", "turned/lora/r4/float", "turned/lora/r8/float")
FULL = "turned/full/float"


@dataclass(frozen=True)
class Entrant:
    """A rule as it takes part: which programs, which settings, and its learning rate where it has one of its own."""

    name: str
    rule: Rule
    program_of: Callable[[int, int], str] = lambda client, number: AB
    model: str = AB
    settings: MergeSettings = field(default_factory=MergeSettings)
    rate: float | None = None


def lora(**settings: Any) -> MergeSettings:
    """Merge settings with these of `[merge.lora]`."""
    return MergeSettings(lora=LoraSettings(**settings))


def mixed(client: int, number: int) -> str:  # noqa: ARG001
    """Four clients of rank 2, three of rank 4, three of rank 8."""
    return MIXED[0 if client < 4 else 1 if client < 7 else 2]


EQUAL = (
    Entrant("full fine-tuning", MEAN, lambda client, number: FULL, FULL, rate=1e-3),
    Entrant("factor_mean", FACTOR_MEAN),
    Entrant("product_svd even", PRODUCT_SVD),
    Entrant("product_svd unit_a", PRODUCT_SVD, settings=lora(balance="unit_a")),
    Entrant("product_svd base", PRODUCT_SVD, settings=lora(residual="base")),
    Entrant("stack", STACK),
    Entrant("residual", RESIDUAL),
    Entrant("fair", FAIR),
    Entrant("alternate", ALTERNATE, lambda client, number: B if number % 2 else A, B),
    Entrant("freeze_a", FREEZE_A, lambda client, number: B, B),
    Entrant("fedsvd", FEDSVD, lambda client, number: B, B),
)
RANKS = (
    Entrant("zero padding", ZERO_PADDING, mixed, MIXED[2]),
    Entrant("rank_partition", RANK_PARTITION, mixed, MIXED[2]),
    Entrant("product_svd mean", PRODUCT_SVD, mixed, MIXED[2], lora(mode="mean")),
    Entrant("product_svd change", PRODUCT_SVD, mixed, MIXED[2], lora(mode="change")),
    Entrant("stack", STACK, mixed, MIXED[2]),
)


class Bench:
    """Bundles by seed, built once, and runs; those that `runs` holds are not repeated."""

    def __init__(self, folder: Path, data: str, runs: Runs) -> None:
        self.folder = folder
        self.data = data
        self.runs = runs
        self._bundles: dict[tuple[str, int], Bundle] = {}

    def row(self, table: str, entrant: Entrant, split: str, seed: int, rounds: int, rate: float) -> dict[str, Any]:
        """What one run of one entrant gave, as a row of a table."""
        key = {"data": self.data, "rule": entrant.name, "mixed": entrant in RANKS, "split": split, "seed": seed}
        choices = {**key, "rounds": rounds, "learning_rate": rate}
        found = self.runs.row(choices, lambda: _found(self._run(entrant, split, seed, rounds, rate)))
        reached = [number for number, value in enumerate(found["accuracy"]) if value >= GOALS[self.data]]
        return {"table": table, **found, "rounds_to_goal": reached[0] if reached else rounds + 1}

    def _run(self, entrant: Entrant, split: str, seed: int, rounds: int, rate: float) -> Run:
        data = DATA[self.data](seed, SPLITS[split])
        return federate(
            self.bundle("ranks" if entrant in RANKS else "equal", data, seed),
            data,
            entrant.rule,
            entrant.program_of,
            model=entrant.model,
            rounds=rounds,
            learning_rate=rate,
            seed=seed,
            settings=entrant.settings,
        )

    def bundle(self, kind: str, data: Task, seed: int) -> Bundle:
        """The bundle of a seed: equal ranks in all factors, or ranks 2, 4, 8."""
        from export import ProgramSpec

        if (kind, seed) not in self._bundles:
            if kind == "equal":
                programs = [ProgramSpec("full", {}, "float", "adamw")]
                options: list[dict[str, Any]] = [{"rank": 4, "factors": factors} for factors in ("ab", "a", "b")]
            else:
                programs = []
                options = [{"rank": rank, "named_by_rank": True} for rank in (2, 4, 8)]
            programs += [ProgramSpec("lora", {**held, "side_rank": SIDE}, "float", "adamw") for held in options]
            path = self.folder / f"{kind}-{seed}.bundle"
            build(path, data, seed, programs)
            self._bundles[kind, seed] = Bundle.open(path)
        return self._bundles[kind, seed]

    def close(self) -> None:
        """Remove what was unpacked."""
        for bundle in self._bundles.values():
            bundle.close()


def measure(args: argparse.Namespace) -> report.Report:
    """The tables that were asked for."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.data, Runs(args.runs))
        try:
            for table in args.table:
                rows += {"rules": _rules, "lr": _rates, "ranks": _ranks}[table](bench, args)
        finally:
            bench.close()
    if args.plots is not None:
        plot(rows, args.plots, args.data)
    if args.tables is not None:
        write_tables(rows, args.tables, args.data)
    return report.Report(rows, summarise(rows))


def _found(run: Run) -> dict[str, Any]:
    naive = [found["naive_error"] for found in run.reports if found.get("naive_error") is not None]
    last = len(run.accuracy) - 1
    return {
        "final": run.final,
        "round_5": run.accuracy[min(5, last)],
        "round_10": run.accuracy[min(10, last)],
        "naive_error": float(np.mean(naive)) if naive else None,
        "accuracy": run.accuracy,
    }


def _chosen(entrants: Sequence[Entrant], args: argparse.Namespace) -> list[Entrant]:
    return [entrant for entrant in entrants if args.rules is None or entrant.name in args.rules]


def _rules(bench: Bench, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every rule at one learning rate."""
    return [
        bench.row("rules", entrant, split, seed, args.rounds, entrant.rate or ONE_RATE)
        for seed in range(args.seeds)
        for split in SPLITS
        for entrant in _chosen(EQUAL, args)
    ]


def _rates(bench: Bench, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The grid at Dirichlet 0.3."""
    return [
        bench.row("lr", entrant, "dirichlet 0.3", seed, args.rounds // 2, rate)
        for seed in range(args.rate_seeds)
        for entrant in _chosen(EQUAL[1:], args)
        for rate in args.rates
    ]


def _ranks(bench: Bench, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Mixed ranks at Dirichlet 0.3: the rate of each rule is chosen on a seed of its own, the pairs are the others."""
    rows = []
    for entrant in RANKS:
        tuned = [
            bench.row("ranks, tuning", entrant, "dirichlet 0.3", args.seeds, MIXED_ROUNDS, rate) for rate in args.rates
        ]
        best = max(tuned, key=lambda row: row["final"])["learning_rate"]
        rows += tuned
        rows += [bench.row("ranks", entrant, "dirichlet 0.3", seed, MIXED_ROUNDS, best) for seed in range(args.seeds)]
    return rows


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures that criteria 5 and 6 of the LoRA design ask for."""
    summary: dict[str, Any] = {}
    for split in ("dirichlet 0.3", "dirichlet 0.1"):
        ours, naive = (_of(rows, "rules", name, split) for name in ("product_svd even", "factor_mean"))
        if not ours or not naive:
            continue
        gains = [a["round_10"] - b["round_10"] for a, b in zip(ours, naive, strict=True)]
        key = split.replace("dirichlet 0.", "skew_0_")
        summary[f"gain_round_10_{key}"], summary[f"gain_round_10_{key}_interval"] = interval(gains)
        summary[f"pairs_ahead_{key}"] = float(np.mean([gain > 0 for gain in gains]))
        summary[f"rounds_to_goal_ratio_{key}"] = float(
            np.median([row["rounds_to_goal"] for row in ours]) / np.median([row["rounds_to_goal"] for row in naive])
        )
    errors = [
        np.mean([row["naive_error"] for row in _of(rows, "rules", "product_svd even", split)] or [0])
        for split in SPLITS
    ]
    if any(errors):
        summary["naive_error_grows_with_skew"] = bool(errors[0] < errors[1] < errors[2])
    final = {entrant.name: [row["final"] for row in _of(rows, "ranks", entrant.name)] for entrant in RANKS}
    if all(final.values()):
        for name, better, worse in (
            ("change_over_padding", "product_svd change", "zero padding"),
            ("change_over_mean", "product_svd change", "product_svd mean"),
            ("stack_over_change", "stack", "product_svd change"),
        ):
            gains = [a - b for a, b in zip(final[better], final[worse], strict=True)]
            summary[name], summary[f"{name}_interval"] = interval(gains)
    return summary


def _of(rows: list[dict[str, Any]], table: str, rule: str, split: str | None = None) -> list[dict[str, Any]]:
    return [row for row in rows if (row["table"], row["rule"]) == (table, rule) and split in (None, row["split"])]


def lines(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each table, rule, split and rate: means over seeds, with the 95 % interval of the final accuracy."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["table"], row["split"], row["rule"], row["learning_rate"]), []).append(row)
    found = []
    for (table, split, rule, rate), members in groups.items():
        mean, half = interval([row["final"] for row in members])
        naive = [row["naive_error"] for row in members if row["naive_error"] is not None]
        found.append(
            {
                "table": table,
                "split": split,
                "rule": rule,
                "learning_rate": rate,
                "seeds": len(members),
                "round_5": float(np.mean([row["round_5"] for row in members])),
                "round_10": float(np.mean([row["round_10"] for row in members])),
                "final": mean,
                "interval": None if np.isnan(half) else half,
                "rounds_to_goal": float(np.median([row["rounds_to_goal"] for row in members])),
                "naive_error": float(np.mean(naive)) if naive else None,
            }
        )
    return found


def write_tables(rows: list[dict[str, Any]], folder: Path, data: str) -> None:
    """The lines as `lora-DATA.csv` and `lora-DATA.md` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    found = lines(rows)
    with (folder / f"lora-{data}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(COLUMNS))
        writer.writeheader()
        writer.writerows(found)
    table = [list(COLUMNS.values()), ["---"] * len(COLUMNS), *([_cell(row[key]) for key in COLUMNS] for row in found)]
    (folder / f"lora-{data}.md").write_text("".join(f"| {' | '.join(cells)} |\n" for cells in table))


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def plot(rows: list[dict[str, Any]], folder: Path, data: str) -> None:
    """Accuracy over rounds at one rate, accuracy over the rate, and mixed ranks: PNG files in `folder`."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    stem = "lora" if data == "digits" else f"lora-{data}"
    for split in SPLITS:
        if not any(row["table"] == "rules" and row["split"] == split for row in rows):
            continue
        figure, axes = plt.subplots(figsize=(7, 4.5))
        for entrant in EQUAL:
            curves = [row["accuracy"] for row in _of(rows, "rules", entrant.name, split)]
            if curves:
                axes.plot(np.mean(curves, axis=0), label=entrant.name)
        axes.set(
            xlabel="round", ylabel="test accuracy", title=f"{data}, learning rate {ONE_RATE:g}, {split}", ylim=(0, 1)
        )
        _save(figure, axes, folder / f"{stem}-rules-{split.replace(' ', '-').replace('.', '')}.png")
    if any(row["table"] == "lr" for row in rows):
        figure, axes = plt.subplots(figsize=(7, 4.5))
        for entrant in EQUAL[1:]:
            mine = _of(rows, "lr", entrant.name)
            if not mine:
                continue
            rates = sorted({row["learning_rate"] for row in mine})
            means = [np.mean([row["final"] for row in mine if row["learning_rate"] == rate]) for rate in rates]
            axes.semilogx(rates, means, marker="o", label=entrant.name)
        axes.set(
            xlabel="learning rate",
            ylabel="final accuracy",
            title=f"{data}, dirichlet 0.3, half the rounds",
            ylim=(0, 1),
        )
        _save(figure, axes, folder / f"{stem}-rates.png")
    if any(row["table"] == "ranks" for row in rows):
        figure, axes = plt.subplots(figsize=(7, 4.5))
        for entrant in RANKS:
            curves = [row["accuracy"] for row in _of(rows, "ranks", entrant.name)]
            axes.plot(np.mean(curves, axis=0), label=entrant.name)
        axes.set(
            xlabel="round",
            ylabel="test accuracy",
            title=f"{data}, ranks 2, 4 and 8, each rule at its own rate",
            ylim=(0, 1),
        )
        _save(figure, axes, folder / f"{stem}-ranks.png")


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    figure.clear()


COLUMNS = {
    "table": "table",
    "split": "split",
    "rule": "rule",
    "learning_rate": "lr",
    "seeds": "seeds",
    "round_5": "round 5",
    "round_10": "round 10",
    "final": "final",
    "interval": "+-",
    "rounds_to_goal": "to goal",
    "naive_error": "naive error",
}


def show(found: report.Report) -> str:
    """Means over seeds and the summary."""
    figures = "\n".join(f"{name} {value}" for name, value in found.summary.items())
    return f"{report.table(lines([dict(row) for row in found.rows]), COLUMNS)}\n\n{figures}"


def arguments() -> argparse.ArgumentParser:
    """The options."""
    parser = report.parser("lora-study", __doc__)
    parser.add_argument("--table", nargs="+", choices=("rules", "lr", "ranks"), default=["rules", "lr", "ranks"])
    parser.add_argument("--rules", nargs="+", choices=[e.name for e in EQUAL], help="only these, in `rules` and `lr`")
    parser.add_argument("--data", choices=DATA, default="digits", help="fashion: Fashion-MNIST of a Debian package")
    parser.add_argument("--runs", type=Path, metavar="FILE", help="keep every run there, and repeat none that it holds")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rate-seeds", type=int, default=2, help="seeds of the grid of learning rates")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write PNG files there")
    parser.add_argument("--tables", type=Path, metavar="FOLDER", help="write the tables there as CSV and Markdown")
    return parser


if __name__ == "__main__":
    sys.exit(report.main(measure, show, arguments()))
