"""What travels up per device and round on the watch net, and what that costs in accuracy: the demo with other updates.

Every run is the demo itself: gateway, broker and six device processes, fifteen rounds, judged on two people whom nobody
trains on. `body` is a training update as it is stored, `up` everything of a device in a round as it came through the
broker: payloads and topics of statuses, offers, updates and evaluations. Shares are of the network's 13,455 parameters in
float32, and of what the run in which everything trains and travels in float32 sent up.
"""

from __future__ import annotations

import argparse
import sqlite3
import sys
import tempfile
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.digits import interval
from benchmarks.runs import Runs
from examples.demo import Options, run

PARAMETERS = 13_455
FULL = ("full, float32, rate 0.001", "full, float32, rate 0.003")
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    FULL[0]: {"scope": "full", "merge": "mean", "encoding": "float32", "learning_rate": 1e-3},
    FULL[1]: {"scope": "full", "merge": "mean", "encoding": "float32", "learning_rate": 3e-3},
    "full, int8_row, rate 0.003": {"scope": "full", "merge": "mean", "encoding": "int8_row", "learning_rate": 3e-3},
    "rank 4, float32": {"rank": 4, "alpha": 4.0, "encoding": "float32"},
    "rank 4, int8_row": {"rank": 4, "alpha": 4.0},
    "rank 2, float32": {"rank": 2, "alpha": 2.0, "encoding": "float32"},
    "rank 2, int8_row": {"rank": 2, "alpha": 2.0},
    "rank 1, int8_row": {"rank": 1, "alpha": 1.0},
}


def measure(args: argparse.Namespace) -> report.Report:
    """Every variant with every seed."""
    runs = Runs(args.runs)
    rows = [
        runs.row({"variant": name, "seed": seed}, partial(_run, name, seed, args))
        for seed in range(args.seeds)
        for name in VARIANTS
    ]
    return report.Report(rows, _summary(rows))


def _run(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        python = args.device_python or Options().device_python
        options = Options(seed=seed, controls=False, folder=Path(folder), device_python=python, **VARIANTS[name])
        result = run(options, show=False)
        gateway = Path(result.model).parent
        with closing(sqlite3.connect(gateway / "journal.sqlite")) as journal:
            (body,) = journal.execute("SELECT avg(size) FROM ledger WHERE phase = 'train'").fetchone()
            traffic = journal.execute("SELECT avg(up) FROM traffic WHERE round > 0").fetchone()
    return {"accuracy": result.accuracy_after, "body": body, "up": traffic[0], "lost": result.lost}


def lines(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds; `lost` is against the better one of the two full runs, paired by seed, with its 95 % interval."""

    def of(name: str, key: str) -> list[float]:
        return [row[key] for row in rows if row["variant"] == name]

    control = max(FULL, key=lambda name: float(np.mean(of(name, "accuracy"))))
    found = []
    for name in VARIANTS:
        lost, half = interval([a - b for a, b in zip(of(control, "accuracy"), of(name, "accuracy"), strict=True)])
        body, up = float(np.mean(of(name, "body"))), float(np.mean(of(name, "up")))
        found.append(
            {
                "variant": name,
                "accuracy": float(np.mean(of(name, "accuracy"))),
                "lost": lost,
                "interval": None if np.isnan(half) else half,
                "body": round(body),
                "up": round(up),
                "times_smaller_body": 4 * PARAMETERS / body,
                "times_smaller_up": float(np.mean(of(control, "up"))) / up,
            }
        )
    return found


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    by_name = {line["variant"]: line for line in lines(rows)}
    return {
        "lost_by_int8_rank_4": by_name["rank 4, float32"]["accuracy"] - by_name["rank 4, int8_row"]["accuracy"],
        "lost_by_int8_rank_2": by_name["rank 2, float32"]["accuracy"] - by_name["rank 2, int8_row"]["accuracy"],
        **{
            f"{name}: {key}": line[key]
            for name, line in by_name.items()
            if "int8" in name
            for key in ("lost", "times_smaller_body", "times_smaller_up")
        },
    }


COLUMNS = {
    "variant": "variant",
    "accuracy": "accuracy",
    "lost": "lost",
    "interval": "+-",
    "body": "body, bytes",
    "times_smaller_body": "times smaller",
    "up": "up, bytes",
    "times_smaller_up": "times smaller",
}


def show(found: report.Report) -> str:
    """The table and the figures."""
    figures = "\n".join(f"{name} {value:.4f}" for name, value in found.summary.items())
    return f"{report.table(lines([dict(row) for row in found.rows]), COLUMNS)}\n\n{figures}"


def arguments() -> argparse.ArgumentParser:
    """The options."""
    parser = report.parser("watch-bytes", __doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, metavar="FILE", help="keep every run there, and repeat none that it holds")
    parser.add_argument("--device-python", type=Path, help="Python of the devices' environment")
    return parser


if __name__ == "__main__":
    sys.exit(report.main(measure, show, arguments()))
