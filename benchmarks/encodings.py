"""How many bytes an update takes in each encoding, and what that costs in accuracy: turned digits, ten clients.

`full`: everything trains and the mean merges, so residuals are kept. `lora`: rank 4, `product_svd` merges and changes
the basis every round, so residuals are cleared. Bytes are those of the bodies that an offer announces, compression included.
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
from aggregator.merge.lora import PRODUCT_SVD
from aggregator.merge.mean import MEAN
from benchmarks import report
from benchmarks.digits import Task, build, federate, interval, task
from benchmarks.runs import Runs
from edge_sdk.bundle import Bundle
from edge_sdk.update import Encoding

ENCODINGS: dict[str, Encoding] = {
    "float32": Encoding("float32"),
    "float16": Encoding("float16"),
    "int8_row": Encoding("int8_row"),
    "int4_row": Encoding("int4_row"),
    "int4_row, no feedback": Encoding("int4_row", "clear"),
    "top_k 10 %": Encoding("top_k", density=0.1),
    "top_k 10 %, no feedback": Encoding("top_k", "clear", density=0.1),
    "top_k 2 %": Encoding("top_k", density=0.02),
}
PROGRAMS: dict[str, tuple[str, Rule, float]] = {
    "full": ("turned/full/float", MEAN, 2e-3),
    "lora": ("turned/lora/r4/float", PRODUCT_SVD, 1e-2),
}


def measure(args: argparse.Namespace) -> report.Report:
    """Every encoding of every program, the same seeds."""
    from export import ProgramSpec

    rows: list[dict[str, Any]] = []
    runs = Runs(args.runs)
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            data = task(seed, 0.3)
            path = Path(folder) / f"{seed}.bundle"
            specs = [ProgramSpec("full", {}, "float", "adamw"), ProgramSpec("lora", {"rank": 4}, "float", "adamw")]
            build(path, data, seed, specs)
            with Bundle.open(path) as bundle:
                for scope in PROGRAMS:
                    for name in ENCODINGS:
                        key = {"scope": scope, "encoding": name, "seed": seed, "rounds": args.rounds}
                        rows.append(runs.row(key, partial(_run, bundle, data, key)))
    return report.Report(
        rows,
        {
            f"{r['scope']}, {r['encoding']}": {k: r[k] for k in ("share", "final", "loss", "interval")}
            for r in lines(rows)
        },
    )


def _run(bundle: Bundle, data: Task, chosen: dict[str, Any]) -> dict[str, Any]:
    program, rule, rate = PROGRAMS[chosen["scope"]]
    run = federate(
        bundle,
        data,
        rule,
        lambda client, number: program,
        model=program,
        rounds=chosen["rounds"],
        learning_rate=rate,
        seed=chosen["seed"],
        encoding=ENCODINGS[chosen["encoding"]],
    )
    return {"bytes": run.bytes_up / (chosen["rounds"] * len(data.clients)), "final": run.final}


def lines(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, and what an encoding loses against float32, paired by seed."""
    found = []
    for scope in PROGRAMS:
        plain = [row for row in rows if (row["scope"], row["encoding"]) == (scope, "float32")]
        for name in ENCODINGS:
            mine = [row for row in rows if (row["scope"], row["encoding"]) == (scope, name)]
            size = float(np.mean([row["bytes"] for row in mine]))
            losses = [a["final"] - b["final"] for a, b in zip(plain, mine, strict=True)]
            found.append(
                {
                    "scope": scope,
                    "encoding": name,
                    "bytes": round(size),
                    "share": size / float(np.mean([row["bytes"] for row in plain])),
                    "final": float(np.mean([row["final"] for row in mine])),
                    "loss": interval(losses)[0],
                    "interval": interval(losses)[1] if len(losses) > 1 else None,
                }
            )
    return found


COLUMNS = {
    "scope": "program",
    "encoding": "encoding",
    "bytes": "bytes an update",
    "share": "of float32",
    "final": "accuracy",
    "loss": "lost",
    "interval": "+-",
}


def show(found: report.Report) -> str:
    """The table of bytes against accuracy."""
    return report.table(lines([dict(row) for row in found.rows]), COLUMNS)


def arguments() -> argparse.ArgumentParser:
    """The options."""
    parser = report.parser("encodings", __doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--runs", type=Path, metavar="FILE", help="keep every run there, and repeat none that it holds")
    return parser


if __name__ == "__main__":
    sys.exit(report.main(measure, show, arguments()))
