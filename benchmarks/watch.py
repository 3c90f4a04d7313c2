"""The demo over ten splits of the ten people: how much of its result depends on who is who.

Each split names the people of the base model and those of the test; the other six are devices. A run is the demo itself:
a gateway, a broker and six device processes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import Report, main, parser, table
from examples.demo import Options, run

# (base people, test people): drawn once, before any of them was run.
SPLITS = (
    ((1, 2), (5, 10)),
    ((3, 4), (2, 6)),
    ((2, 9), (1, 7)),
    ((1, 2), (4, 9)),
    ((1, 9), (4, 6)),
    ((7, 9), (4, 8)),
    ((5, 10), (1, 7)),
    ((3, 7), (6, 10)),
    ((3, 4), (1, 6)),
    ((2, 7), (3, 10)),
)
COLUMNS = {
    "base": "base",
    "test": "test",
    "seed": "seed",
    "before": "before",
    "after": "after",
    "rise": "rise",
    "alone": "alone",
    "central": "central",
    "lost": "lost",
    "duplicated": "twice",
    "peak_rss_mb": "MB",
    "seconds": "s",
}


def measure(args: argparse.Namespace) -> Report:
    """One row per split and seed. Accuracies are shares of the test people's windows."""
    rows = []
    for seed in args.seeds:
        for base, test in SPLITS:
            rows.append(_row(Options(base=base, test=test, seed=seed, controls=args.controls, folder=args.folder)))
            print(table(rows[-1:], COLUMNS).splitlines()[1], file=sys.stderr, flush=True)
    return Report(rows, _summary(rows))


def _row(options: Options) -> dict[str, Any]:
    began = time.monotonic()
    result = run(options, show=False)
    return {
        "base": ",".join(map(str, options.base)),
        "test": ",".join(map(str, options.test)),
        "seed": options.seed,
        "before": result.accuracy_before,
        "after": result.accuracy_after,
        "rise": result.accuracy_after - result.accuracy_before,
        "alone": result.accuracy_alone_mean,
        "central": result.accuracy_central,
        "lost": result.lost,
        "duplicated": result.duplicated,
        "broker": result.broker,
        "peak_rss_mb": max(device["peak_rss_mb"] for device in result.devices),
        "bytes_up": sum(device["bytes_up"] for device in result.devices),
        "bytes_down": sum(device["bytes_down"] for device in result.devices),
        "seconds": time.monotonic() - began,
    }


def _summary(rows: list[dict[str, Any]]) -> Mapping[str, Any]:
    return {
        "mean_rise": float(np.mean([row["rise"] for row in rows])),
        "mean_after": float(np.mean([row["after"] for row in rows])),
        "worst_rise": min(row["rise"] for row in rows),
        "lost": sum(row["lost"] for row in rows),
        "duplicated": sum(row["duplicated"] for row in rows),
    }


def _shown(report: Report) -> str:
    figures = "  ".join(f"{key} {value:.3f}" for key, value in report.summary.items())
    return f"{table(report.rows, COLUMNS)}\n\n{figures}"


def _arguments() -> argparse.ArgumentParser:
    arguments = parser("watch", __doc__)
    arguments.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0])
    arguments.add_argument("--controls", action="store_true", help="devices alone and central training too (longer)")
    arguments.add_argument("--folder", type=Path, default=Options().folder / "watch", help="where the runs keep files")
    return arguments


if __name__ == "__main__":
    raise SystemExit(main(measure, _shown, _arguments()))
